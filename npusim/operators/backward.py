"""Backwards that the wheel gives PyTorch's own operators as operators of its own."""

from __future__ import annotations

import torch

from . import operator


@operator("npu_gather_backward")
def gather_backward(
    grad: torch.Tensor, self_size: list[int], dim: int, index: torch.Tensor, sparse_grad: bool
) -> torch.Tensor:
    if sparse_grad:
        raise NotImplementedError("npusim: npu_gather_backward with sparse_grad")
    return grad.new_zeros(self_size).scatter_add_(dim, index, grad)


@operator("repeat_interleave_backward_int")
def repeat_interleave_backward(
    grad: torch.Tensor, input: torch.Tensor, repeats: int, dim: int | None
) -> torch.Tensor:
    if dim is None:
        return grad.unflatten(0, (-1, repeats)).sum(1).view(input.shape)
    place = dim % input.dim()
    return grad.unflatten(place, (input.shape[place], repeats)).sum(place + 1)


@operator("repeat_interleave_backward_tensor")
def repeat_interleave_backward_tensor(
    grad: torch.Tensor, input: torch.Tensor, repeats: torch.Tensor, dim: int | None
) -> torch.Tensor:
    flat = dim is None
    place, total = (0, input.numel()) if dim is None else (dim, input.shape[dim])
    owner = torch.arange(total).repeat_interleave(repeats)
    given = input.reshape(-1) if flat else input
    return torch.zeros_like(given).index_add_(place, owner, grad).view(input.shape)


@operator("matmul_double_backward")
def matmul_double_backward(
    grad_self: torch.Tensor | None,
    grad_other: torch.Tensor | None,
    grad_out: torch.Tensor,
    input: torch.Tensor,
    other: torch.Tensor,
    mask: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of grad_out, input and other, of what ``matmul_gradients`` computes from them."""
    to_grad = torch.zeros_like(grad_out)
    to_input = to_other = None
    if grad_self is not None:
        to_grad = to_grad + torch.matmul(grad_self, other)
        _, to_other = matmul_gradients(grad_out, grad_self, other, [False, True])
    if grad_other is not None:
        to_grad = to_grad + torch.matmul(input, grad_other)
        to_input, _ = matmul_gradients(grad_out, input, grad_other, [True, False])
    return to_grad, to_input, to_other


def matmul_gradients(
    grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(*, m, n) grad, (*, m, k) left, (*, k, n) right; either may be a vector, as in matmul."""
    rows = left.unsqueeze(0) if left.dim() == 1 else left
    columns = right.unsqueeze(-1) if right.dim() == 1 else right
    grad = grad.unsqueeze(-1) if right.dim() == 1 else grad
    grad = grad.unsqueeze(-2) if left.dim() == 1 else grad
    to_left = (grad @ columns.mT).sum_to_size(rows.shape).view(left.shape) if mask[0] else None
    to_right = (rows.mT @ grad).sum_to_size(columns.shape).view(right.shape) if mask[1] else None
    return to_left, to_right
