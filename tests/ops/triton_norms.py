"""The Triton kernels of rms_norm and add_rms_norm, as functions with a reference each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.add_rms_norm import CudaFusedAddRMSNorm
from hf_kernel_patch.ops.add_rms_norm.reference import add_rms_norm as add_reference
from hf_kernel_patch.ops.rms_norm import CudaFusedRMSNorm, reference
from tests.support.ops.checks import (
    F32,
    draw,
)
from tests.support.ops.interpreted import DEVICE, here

NORM, ADD = here(CudaFusedRMSNorm), here(CudaFusedAddRMSNorm)
EPS = 1e-5
RMS_NORM, ADD_RMS_NORM = NORM.load(), ADD.load()


def halves(x: torch.Tensor) -> int:
    return x.shape[-1] // 2 if x.shape[-1] % 4 == 0 else x.shape[-1]


#: name -> (function, reference, how many inputs there are beside the weight)
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "rms_norm": (
        lambda x, weight: RMS_NORM(x, weight, EPS),
        lambda x, weight: reference.rms_norm(x, weight, EPS, dtype=x.dtype),
        1,
    ),
    "add_rms_norm": (
        lambda x, residual, weight: ADD_RMS_NORM(x, residual, weight, EPS, 1.0, False),
        lambda x, residual, weight: add_reference(x, residual, weight, EPS, 1.0, False, x.dtype),
        2,
    ),
    "rms_norm_gated": (
        lambda x, gate, weight: RMS_NORM(x, weight, EPS, gate=gate),
        lambda x, gate, weight: reference.rms_norm(x, weight, EPS, gate=gate, dtype=x.dtype),
        2,
    ),
    # A row that does not make two even groups is one.
    "rms_norm_in_groups": (
        lambda x, gate, weight: RMS_NORM(x, weight, EPS, 0.0, True, gate, halves(x), False),
        lambda x, gate, weight: reference.rms_norm(
            x, weight, EPS, 0.0, True, gate, halves(x), False, dtype=x.dtype
        ),
        2,
    ),
    "rms_norm_sigmoid": (
        lambda x, gate, weight: RMS_NORM(x, weight, EPS, 1.0, False, gate, activation="sigmoid"),
        lambda x, gate, weight: reference.rms_norm(
            x, weight, EPS, 1.0, False, gate, activation="sigmoid", dtype=x.dtype
        ),
        2,
    ),
}
EACH = pytest.mark.parametrize("name", FUNCTIONS)


def operands(
    name: str,
    shape: tuple[int, ...] = (5, 24),
    dtype: torch.dtype = F32,
    layouts: tuple[str, ...] = ("contiguous", "contiguous"),
    grad: bool = True,
) -> list[torch.Tensor]:
    """Inputs of a function, the weight last."""
    count = FUNCTIONS[name][2]
    inputs = [
        draw(shape, dtype, seed=i, layout=layouts[i], grad=grad, device=DEVICE)
        for i in range(count)
    ]
    return [*inputs, draw(shape[-1:], dtype, seed=9, grad=grad, device=DEVICE)]


def flat(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def outcome(
    function: Callable[..., Any], inputs: list[torch.Tensor], layout: str = "contiguous"
) -> list[torch.Tensor]:
    """Outputs, then gradients of the inputs for random incoming ones; the same at every call."""
    outputs = flat(function(*inputs))
    upstream = [
        draw(tuple(out.shape), F32, seed=7 + i, layout=layout, grad=False, device=DEVICE)
        for i, out in enumerate(outputs)
    ]
    upstream = [g.to(out.dtype) for g, out in zip(upstream, outputs)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]
