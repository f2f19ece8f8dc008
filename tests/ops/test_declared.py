"""An op is declared once: its parameters, and what no kernel of it can take."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch

from hf_kernel_patch import BaseKernel, registry
from hf_kernel_patch.kernels import Op
from hf_kernel_patch.ops.rms_norm import RMS_NORM, WIDEST, CudaFusedRMSNorm, TorchFusedRMSNorm

OURS = [k for k in registry.kernels().values() if k.__module__.startswith("hf_kernel_patch.")]
OPS = {kernel.op: kernel.implements for kernel in OURS}


@pytest.mark.parametrize("kernel", OURS, ids=lambda kernel: kernel.kernel_id)
def test_each_of_our_kernels_names_a_declaration(kernel: Any) -> None:
    assert isinstance(kernel.implements, Op)
    assert type(kernel.op) is str and kernel.op == kernel.implements.name


@pytest.mark.parametrize("name", OPS)
def test_the_parameters_are_those_of_the_reference(name: str) -> None:
    module = importlib.import_module(f"hf_kernel_patch.ops.{name}.reference")
    wanted = {
        p.name: p.default for p in inspect.signature(getattr(module, name)).parameters.values()
    }
    del wanted["dtype"]  # of the arithmetic, for the truth
    declared = OPS[name]
    assert declared is not None
    found = declared.parameters
    if name == "linear_cross_entropy":  # most of it are numbers, which it takes as they come
        wanted = {key: wanted[key] for key in found}
    assert found == wanted
    assert list(found) == list(wanted)


def test_a_kernel_has_the_declared_check_with_its_limits() -> None:
    x, wide = torch.ones(2, 4), torch.ones(1, WIDEST + 1)
    assert TorchFusedRMSNorm.why_fallback is RMS_NORM.why_fallback
    assert TorchFusedRMSNorm.why_fallback(wide, wide[0], 1e-6) is None
    assert f"more than {WIDEST}" in str(CudaFusedRMSNorm.why_fallback(wide, wide[0], 1e-6))
    for kernel in (TorchFusedRMSNorm, CudaFusedRMSNorm):
        assert kernel.why_fallback(x, x[0], 1e-6) is None
        assert "whole groups" in str(kernel.why_fallback(x, x[0], 1e-6, group_size=3))


def test_a_kernel_may_have_a_check_of_its_own() -> None:
    class Own(BaseKernel):
        implements = RMS_NORM

        @classmethod
        def why_fallback(cls, x: Any, *arguments: Any) -> str | None:
            return cls.__name__ if x.dim() > 2 else RMS_NORM.why_fallback(x, *arguments)

    class Heir(CudaFusedRMSNorm):
        @classmethod
        def why_fallback(cls, *arguments: Any) -> str | None:
            return super().why_fallback(*arguments) or "never"

    class Plain(BaseKernel):
        op = "rms_norm"

    x = torch.ones(2, 4)
    assert Own.op == Heir.op == "rms_norm"
    assert Own.why_fallback(x, x[0], 1e-6) is None
    assert Own.why_fallback(x[None], x[0], 1e-6) == "Own"
    assert "weight" in str(Own.why_fallback(x, x, 1e-6))
    assert Heir.why_fallback(x, x[0], 1e-6) == "never"
    assert "weight" in str(Heir.why_fallback(x, x, 1e-6))
    assert Plain.implements is None and Plain.why_fallback(x, x, 1e-6) is None
