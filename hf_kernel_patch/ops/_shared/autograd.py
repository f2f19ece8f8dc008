"""What the autograd functions of the ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

Tensors = tuple[torch.Tensor, ...]
#: What an op takes beside tensors, in its own order: numbers, flags, names.
Options = tuple[Any, ...]
#: The gradients of an op's tensors; None for one that needs none.
Gradients = Sequence[torch.Tensor | None]


def differentiable(
    forward: Callable[[Tensors, Options], tuple[torch.Tensor, Tensors]],
    backward: Callable[[torch.Tensor, Tensors, Tensors, Options, tuple[bool, ...]], Gradients],
    plain: Callable[[Tensors, Options], torch.Tensor],
) -> Callable[[Tensors, Options], torch.Tensor]:
    """An op of one output with a backward written by hand, as ``function(tensors, options)``.

    Args:
        forward: (tensors, options) -> the output, and what the backward needs beside the tensors.
        backward: (gradient of the output, tensors, what was kept, options, which of the tensors
            need a gradient) -> their gradients, in the tensors' dtypes.
        plain: the same op in plain PyTorch, for gradients of gradients.

    Without a gradient to compute there is no graph and nothing is kept.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, options: Options, *tensors: torch.Tensor) -> torch.Tensor:
            out, kept = forward(tensors, options)
            ctx.save_for_backward(*tensors, *kept)
            ctx.options, ctx.count = options, len(tensors)
            return out

        @staticmethod
        def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            saved = ctx.saved_tensors  # once: checkpointing recomputes at every look
            tensors, kept = saved[: ctx.count], saved[ctx.count :]
            if torch.is_grad_enabled():
                again = eager_gradients(lambda *t: plain(t, ctx.options), tensors, (grad,))
                return None, *again
            return None, *backward(grad, tensors, kept, ctx.options, ctx.needs_input_grad[1:])

    def function(tensors: Tensors, options: Options) -> torch.Tensor:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            out: torch.Tensor = Function.apply(options, *tensors)
            return out
        return forward(tensors, options)[0]

    return function


def eager_gradients(
    function: Callable[..., Any],
    tensors: Sequence[torch.Tensor | None],
    gradients: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Gradients of ``function(*tensors)`` through plain autograd, themselves differentiable.

    A tensor may be None, and so may the gradient of an output that nothing came back for.

    A backward written by hand calls this when gradients of gradients are asked for, that is while
    ``torch.is_grad_enabled()`` in the backward.
    """
    with torch.enable_grad():
        # Views, so that a tensor given twice, or one computed from another, is its own variable.
        tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = zip(outputs, gradients, strict=True)
    used = [(out, grad) for out, grad in pairs if grad is not None and out.requires_grad]
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    if not used or not wanted:
        return [None] * len(tensors)
    outputs, gradients = zip(*used, strict=True)
    found = torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True)
    by_id = dict(zip(map(id, wanted), found, strict=True))
    return [by_id.get(id(tensor)) for tensor in tensors]
