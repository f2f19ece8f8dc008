"""linear_cross_entropy in plain PyTorch: logits of a chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.autograd import eager_gradients
from hf_kernel_patch.ops.linear_cross_entropy import reference
from hf_kernel_patch.ops.linear_cross_entropy.reference import items, shifted

#: Logits of one chunk, in elements (float32: 128 MiB).
CHUNK_ELEMENTS = 1 << 25


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.linear_cross_entropy.reference.linear_cross_entropy`.

    Logits are rounded to hidden's dtype, as the head of the original gives them; gradients of the
    weight are summed in float32. Rows whose label is ``ignore_index`` cost nothing.
    """
    targets = shifted(labels, shift_labels, ignore_index)
    divisor = items(targets, num_items_in_batch, ignore_index)
    total = _Total.apply(hidden.flatten(0, -2), weight, targets, scale, softcap, ignore_index)
    return total / divisor


class _Total(torch.autograd.Function):
    """The sum of the losses; gradients are made in the forward, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
        ignore_index: int,
    ) -> torch.Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        rows = (targets != ignore_index).nonzero().squeeze(1)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for chunk in rows.split(max(1, CHUNK_ELEMENTS // len(weight))):
            x, target = hidden[chunk], targets[chunk]
            logits = (x @ weight.t()).float()
            if scale != 1.0:
                logits *= scale
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            total += F.cross_entropy(logits, target, reduction="sum")
            if not (needs_hidden or needs_weight):
                continue
            grad = torch.softmax(logits, dim=-1)
            grad[torch.arange(len(target), device=grad.device), target] -= 1.0
            if softcap is not None:
                grad *= 1.0 - (logits / softcap).square_()
            grad = grad.mul_(scale).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight += (grad.t() @ x).float()
        ctx.save_for_backward(hidden, weight, targets, grad_hidden, grad_weight)
        ctx.options = scale, softcap, ignore_index
        ctx.empty = len(rows) == 0
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden, weight, targets, grad_hidden, grad_weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            scale, softcap, ignore_index = ctx.options

            def eager(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
                return reference.linear_cross_entropy(
                    hidden.unsqueeze(0),
                    weight,
                    None,
                    scale=scale,
                    softcap=softcap,
                    num_items_in_batch=1,
                    ignore_index=ignore_index,
                    shift_labels=targets,
                )

            return *eager_gradients(eager, (hidden, weight), (grad,)), None, None, None, None
        if ctx.empty:  # the mean of nothing is NaN, but its gradient is zero, as in the original
            grad = torch.zeros_like(grad)
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None
