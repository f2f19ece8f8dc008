"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops._shared.autograd import eager_gradients
from hf_kernel_patch.ops.moe.experts import Experts
from hf_kernel_patch.ops.swiglu.reference import activate

#: Gate and up of every expert: one tensor (E, 2I, H), or E pairs of (I, H).
GateUp: TypeAlias = torch.Tensor | Sequence[tuple[torch.Tensor, torch.Tensor]]
#: The second projection of every expert: one tensor (E, H, I), or E tensors (H, I).
Down: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


class Gating(NamedTuple):
    """What stacked experts compute between and around their products, where it is their own.

    Attributes:
        gate: (rows, N) -> (rows, I), what stands between the products; it treats every row alone.
        gate_up_bias: (E, N), or None.
        down_bias: (E, H), or None.
        transposed: whether the weights are gate_up (E, H, N) and down (E, I, H).
        after: (rows, H) -> (rows, H), what follows on the second product, or None.
    """

    gate: Callable[[torch.Tensor], torch.Tensor]
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    transposed: bool = False
    after: Callable[[torch.Tensor], torch.Tensor] | None = None


def moe(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: GateUp,
    down: Down,
    activation: str | Gating = "silu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Sum over a token's experts of weight * down(activation(gate x) * up x).

    Args:
        hidden: (T, H) tokens.
        index: (T, K) int64 experts of every token; an index of E, the number of experts, stands
            for an expert of another rank under expert parallelism and adds nothing.
        weights: (T, K) routing weights, of hidden's dtype or float32.
        gate_up: (E, 2I, H), or E pairs (gate, up), each (I, H).
        down: (E, H, I), or E tensors (H, I).
        activation: "silu", "gelu" or "gelu_tanh"; or, of stacked experts, a Gating.
        dtype: of the arithmetic.

    Returns:
        (T, H) in hidden's dtype.
    """
    wide = hidden.to(dtype)
    out = torch.zeros_like(wide)
    chosen = bool((index < len(down)).any())  # where none is, the empty sum still has a gradient
    for expert in range(len(down)):
        token, slot = torch.where(index == expert)
        if not len(token) and chosen:
            continue  # and so, in a list, no gradient
        first, second = gate_up[expert], down[expert]
        if isinstance(activation, str):
            y = _plain(wide[token], first, second, activation)
        else:
            y = _gated(wide[token], first, second, activation, expert)
        out = out.index_add(0, token, y * weights[token, slot, None].to(dtype))
    return out.to(hidden.dtype)


def _plain(x: torch.Tensor, first: Any, second: torch.Tensor, activation: str) -> torch.Tensor:
    """The rows of one expert."""
    gate, up = (
        F.linear(x, part.to(x.dtype))
        for part in (first.chunk(2) if isinstance(first, torch.Tensor) else first)
    )
    return F.linear(activate(gate, activation) * up, second.to(x.dtype))


def _gated(
    x: torch.Tensor, first: Any, second: torch.Tensor, gating: Gating, expert: int
) -> torch.Tensor:
    """The rows of one expert with a gate of its own."""
    for weight, bias, then in (
        (first, gating.gate_up_bias, gating.gate),
        (second, gating.down_bias, gating.after),
    ):
        dtype = x.dtype
        x = x @ (weight if gating.transposed else weight.t()).to(dtype)
        if bias is not None:
            x = x + bias[expert].to(dtype)
        if then is not None:
            x = then(x).to(dtype)
    return x


def plain_gradients(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    experts: Experts,
) -> list[torch.Tensor | None]:
    """Gradients of hidden, weights and the flat experts that can be differentiated again."""

    def eager(hidden: torch.Tensor, weights: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        return moe(hidden, index, weights, *Experts(flat).arguments, activation)

    return eager_gradients(eager, (hidden, weights, *experts.flat), (grad,))
