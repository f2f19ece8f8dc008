"""The definitions, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_kernel_patch.ops.swiglu.reference import activate


def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """x (..., K) times each weight (N, K) transposed, plus its bias (N,): (..., N) in x's dtype.

    Summed in ``dtype`` and rounded once.
    """
    found = []
    for weight, bias in zip(weights, biases, strict=True):
        out = x.to(dtype) @ weight.to(dtype).t()
        found.append((out if bias is None else out + bias.to(dtype)).to(x.dtype))
    return found


def gated(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    activation: str = "silu",
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate, up and activation(gate) * up, all of them (..., I); rounded to x's dtype at each step.

    ``activation`` as :func:`hf_kernel_patch.ops.swiglu.reference.swiglu` takes it.
    """
    gate, up = linears(x, (gate_weight, up_weight), (gate_bias, up_bias), dtype)
    activated = activate(gate.to(dtype), activation).to(x.dtype)
    return gate, up, (activated.to(dtype) * up.to(dtype)).to(x.dtype)
