"""moe in Triton: pairs sorted on the device, gathers and activation within the products.

Eager calls launch without torch's dispatcher; torch.compile sees operators of the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_kernel_patch.ops.moe.experts import Experts
from hf_kernel_patch.ops.moe.reference import Down, GateUp, plain_gradients
from hf_kernel_patch.ops.moe.triton.pipeline import backward, forward
from hf_kernel_patch.ops.moe.triton.routing import Plan


def moe(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: GateUp,
    down: Down,
    activation: str = "silu",
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.moe.reference.moe`.

    Rounds where the original does; the sum over a token's experts is in float32, slot by slot, so
    that the same inputs give the same bits. In a list of experts, one that no token chose gets no
    gradient, as in the original; under torch.compile and in CUDA graphs it gets zeros.
    """
    experts = Experts.of(gate_up, down)
    keep = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden, weights, *experts.flat)
    )
    if torch.compiler.is_compiling():
        return operator(hidden, index, weights, list(experts.flat), activation, keep)[0]
    if keep:
        return _MoE.apply(hidden, index, weights, activation, *experts.flat)
    return forward(hidden, index, weights, experts, activation, keep=False)[0]


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        activation: str,
        *flat: torch.Tensor,
    ) -> torch.Tensor:
        experts = Experts(flat)
        out, kept, order = forward(hidden, index, weights, experts, activation, keep=True)
        sorted_pairs = () if order is None else order[:4]
        ends = () if order is None or not experts.listed else (_to_host(order.ends),)
        ctx.save_for_backward(hidden, index, weights, kept, *flat, *sorted_pairs, *ends)
        ctx.activation, ctx.count = activation, len(flat)
        ctx.tiles = None if order is None else order[4:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden, index, weights, kept, *rest = ctx.saved_tensors
        experts, rest = Experts(rest[: ctx.count]), rest[ctx.count :]
        order = None if ctx.tiles is None else Plan(*rest[:4], *ctx.tiles)
        if torch.is_grad_enabled():
            again = plain_gradients(grad, hidden, index, weights, ctx.activation, experts)
            return again[0], None, again[1], None, *again[2:]
        needs = ctx.needs_input_grad
        needed = needs[0], needs[2], *experts.any_needed(needs[4:])
        found = backward(grad, hidden, index, weights, experts, kept, order, ctx.activation, needed)
        used = _used(order, rest[4:], experts)
        parts = experts.split_gradients(found[2], found[3], needs[4:], used)
        return found[0], None, found[1], None, *parts


def _to_host(ends: torch.Tensor) -> torch.Tensor:
    """Where experts' rows end, on its way to the host while the device works.

    The very tensor where there is no way to go, or none in the capture of a CUDA graph.
    """
    if not ends.is_cuda or torch.cuda.is_current_stream_capturing():
        return ends
    waiting: Any = torch.empty(ends.shape, dtype=ends.dtype, pin_memory=True)
    waiting.copy_(ends, non_blocking=True)
    # With the tensor itself, so that one that a checkpoint computes again does not have it.
    waiting.arrived = torch.cuda.Event()
    waiting.arrived.record()
    return waiting


def _used(order: Plan | None, host: Sequence[torch.Tensor], experts: Experts) -> list[bool]:
    """Which experts of a list some token chose; all of them in the capture of a CUDA graph.

    ``host`` is what ``_to_host`` gave, or nothing for stacked experts, which are taken as a whole.
    """
    if not host or order is None:
        return [order is not None] * experts.count
    ends = host[0]
    if (arrived := getattr(ends, "arrived", None)) is not None:
        arrived.synchronize()
    elif order.ends.is_cuda and torch.cuda.is_current_stream_capturing():
        return [True] * experts.count
    else:
        ends = order.ends
    rows = ends.tolist()
    return [end > start for start, end in zip([0, *rows], rows, strict=False)]


@torch.library.custom_op("hf_kernel_patch::moe", mutates_args=())
def operator(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: list[torch.Tensor],
    activation: str,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and gate and up of every row where ``keep``."""
    out, kept, _ = forward(hidden, index, weights, Experts(experts), activation, keep)
    return out, hidden.new_empty(0) if kept is None else kept


@operator.register_fake
def _(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: list[torch.Tensor],
    activation: str,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _, width = Experts(experts).sizes
    kept = hidden.new_empty(index.numel(), 2 * width) if keep else hidden.new_empty(0)
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), kept


@torch.library.custom_op("hf_kernel_patch::moe_backward", mutates_args=())
def backward_operator(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: list[torch.Tensor],
    kept: torch.Tensor,
    activation: str,
    needed: list[bool],
) -> list[torch.Tensor]:
    """The gradients of ``backward``, with empty tensors for None."""
    one, two, three, four = needed
    found = backward(
        grad, hidden, index, weights, Experts(experts), kept, None, activation,
        (one, two, three, four),
    )  # fmt: skip
    return [hidden.new_empty(0) if part is None else part for part in found]


@backward_operator.register_fake
def _(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: list[torch.Tensor],
    kept: torch.Tensor,
    activation: str,
    needed: list[bool],
) -> list[torch.Tensor]:
    count = Experts(experts).count
    size, width = Experts(experts).sizes
    dense = torch.contiguous_format
    made = (
        torch.empty_like(hidden, memory_format=dense),
        torch.empty_like(weights, memory_format=dense),
        hidden.new_empty(count, 2 * width, size),
        hidden.new_empty(count, size, width),
    )
    return [one if wanted else hidden.new_empty(0) for one, wanted in zip(made, needed)]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, index, weights, experts, ctx.activation, _ = inputs
    ctx.save_for_backward(hidden, index, weights, output[1], *experts)
    ctx.needs = [tensor.requires_grad for tensor in experts]


def _operator_backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    hidden, index, weights, kept, *flat = ctx.saved_tensors
    experts, needs = Experts(flat), ctx.needs
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], *experts.any_needed(needs)]
    found = backward_operator(grad, hidden, index, weights, flat, kept, ctx.activation, needed)
    grads = [one if wanted else None for one, wanted in zip(found, needed)]
    parts = experts.split_gradients(grads[2], grads[3], needs, [True] * experts.count)
    return grads[0], None, grads[1], parts, None, None


operator.register_autograd(_operator_backward, setup_context=_setup)
