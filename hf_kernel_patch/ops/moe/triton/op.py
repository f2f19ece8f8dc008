"""moe in Triton: pairs sorted on the device, gathers and activation within the products.

Eager calls launch without torch's dispatcher; torch.compile sees operators of the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_kernel_patch.ops.moe.experts import Experts
from hf_kernel_patch.ops.moe.reference import Down, GateUp, plain_gradients
from hf_kernel_patch.ops.moe.triton.pipeline import Needed, backward, forward
from hf_kernel_patch.ops.moe.triton.routing import Routing

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx


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
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        activation: str,
        *flat: torch.Tensor,
    ) -> torch.Tensor:
        experts = Experts(flat)
        out, kept, routing = forward(hidden, index, weights, experts, activation, keep=True)
        # Tensors go through save_for_backward, all of them, where checkpoints and hooks see them.
        sorted_pairs = () if routing is None else routing[:4]
        ends = (_to_host(routing.ends),) if routing is not None and experts.listed else ()
        ctx.save_for_backward(hidden, index, weights, kept, *flat, *sorted_pairs, *ends)
        ctx.activation, ctx.count = activation, len(flat)
        ctx.tiles = None if routing is None else routing[4:]
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, index, weights, kept, *rest = ctx.saved_tensors
        experts, rest = Experts(rest[: ctx.count]), rest[ctx.count :]
        routing = None if ctx.tiles is None else Routing(*rest[:4], *ctx.tiles)
        activation = ctx.activation
        if torch.is_grad_enabled():
            again = plain_gradients(grad, hidden, index, weights, activation, experts)
            return again[0], None, again[1], None, *again[2:]
        needs_hidden, _, needs_weights, _, *needs_experts = ctx.needs_input_grad
        needed = Needed(needs_hidden, needs_weights, *experts.any_needed(needs_experts))
        grad_hidden, grad_weights, grad_gate_up, grad_down = backward(
            grad, hidden, index, weights, experts, kept, routing, activation, needed
        )
        used = _used(routing, rest[4:], experts) if experts.listed else ()
        parts = experts.split_gradients(grad_gate_up, grad_down, needs_experts, used)
        return grad_hidden, None, grad_weights, None, *parts


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


def _used(
    routing: Routing | None, host: Sequence[torch.Tensor], experts: Experts
) -> Sequence[bool]:
    """Which experts of a list some token chose; all of them in the capture of a CUDA graph.

    ``host`` is what ``_to_host`` gave, if there was a token.
    """
    if routing is None:
        return [False] * experts.count
    (ends,) = host
    if (arrived := getattr(ends, "arrived", None)) is not None:
        arrived.synchronize()
    elif routing.ends.is_cuda and torch.cuda.is_current_stream_capturing():
        return [True] * experts.count
    else:
        ends = routing.ends
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
    gradients = backward(
        grad, hidden, index, weights, Experts(experts), kept, None, activation, Needed(*needed)
    )
    return [hidden.new_empty(0) if gradient is None else gradient for gradient in gradients]


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
    count, (size, width) = Experts(experts).count, Experts(experts).sizes
    dense = torch.contiguous_format
    gradients = (
        torch.empty_like(hidden, memory_format=dense),
        torch.empty_like(weights, memory_format=dense),
        hidden.new_empty(count, 2 * width, size),
        hidden.new_empty(count, size, width),
    )
    return [
        gradient if wanted else hidden.new_empty(0) for gradient, wanted in zip(gradients, needed)
    ]


def _setup(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
    hidden, index, weights, experts, ctx.activation, _ = inputs
    ctx.save_for_backward(hidden, index, weights, output[1], *experts)
    ctx.needs_experts = [tensor.requires_grad for tensor in experts]


def _operator_backward(ctx: FunctionCtx, grad: torch.Tensor, _: Any) -> Any:
    hidden, index, weights, kept, *flat = ctx.saved_tensors
    experts = Experts(flat)
    needs_hidden, _, needs_weights, *_ = ctx.needs_input_grad
    needed = [needs_hidden, needs_weights, *experts.any_needed(ctx.needs_experts)]
    found = backward_operator(grad, hidden, index, weights, flat, kept, ctx.activation, needed)
    grad_hidden, grad_weights, grad_gate_up, grad_down = (
        gradient if wanted else None for gradient, wanted in zip(found, needed)
    )
    all_used = [True] * experts.count  # which were is not known without a word to the host
    parts = experts.split_gradients(grad_gate_up, grad_down, ctx.needs_experts, all_used)
    return grad_hidden, None, grad_weights, parts, None, None


operator.register_autograd(_operator_backward, setup_context=_setup)
