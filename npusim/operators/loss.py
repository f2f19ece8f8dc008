"""Cross entropy of class indices."""

from __future__ import annotations

import torch

from . import operator
from .limit import FLOATS, Limit

_NAME = "npu_cross_entropy_loss"
INPUT = Limit(
    _NAME,
    "the input is (N, C), float16, bfloat16 or float32",
    "数据类型支持FLOAT16、FLOAT32、BFLOAT16类型",
)
TARGET = Limit(_NAME, "the target is (N,), int64", "数据类型支持INT64类型")
ROWS = Limit(_NAME, "there are 1 to 200000 rows", "输入shape中N取值范围(0, 200000]")
VALUES = Limit(
    _NAME,
    "every target is a class; a negative ignore_index ignores nothing",
    "当小于0时视为无忽略标签",
)
REDUCTION = Limit(_NAME, "reduction is mean, sum or none", '支持范围["mean", "sum", "none"]')
DEFAULTS = Limit(
    _NAME,
    "with a gradient, all arguments are the defaults, but reduction may be sum or none",
    "mean模式下不支持修改所有含默认值的入参的值",
)


def _limits(input: torch.Tensor, target: torch.Tensor, reduction: str, ignore_index: int) -> None:
    INPUT.require(input.dim() == 2 and input.dtype in FLOATS)
    TARGET.require(target.shape == input.shape[:1] and target.dtype == torch.int64)
    ROWS.require(0 < input.shape[0] <= 200000)
    REDUCTION.require(reduction in ("mean", "sum", "none"))
    ignored = (target == ignore_index) if ignore_index >= 0 else torch.zeros_like(target).bool()
    VALUES.require(bool((ignored | ((target >= 0) & (target < input.shape[1]))).all()))
    if input.requires_grad and reduction == "mean":
        DEFAULTS.require(ignore_index == -100)


@operator(_NAME, limits=_limits)
def cross_entropy(
    input: torch.Tensor, target: torch.Tensor, reduction: str, ignore_index: int
) -> tuple[torch.Tensor, ...]:
    """(N, C), (N,) -> the loss (1,), or (N,) for none; log probabilities; two unused outputs."""
    log_prob = torch.log_softmax(input.float(), -1)
    ignored = target == ignore_index if ignore_index >= 0 else torch.zeros_like(target).bool()
    rows = -log_prob.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    rows = rows.masked_fill(ignored, 0.0)
    if reduction == "none":
        loss = rows
    else:
        loss = rows.sum().reshape(1) / ((~ignored).sum() if reduction == "mean" else 1)
    unused = torch.zeros_like(loss), torch.zeros(input.shape[0])
    return tuple(output.to(input.dtype) for output in (loss, log_prob, *unused))


@operator("npu_cross_entropy_loss_backward")
def cross_entropy_backward(
    grad_loss: torch.Tensor,
    log_prob: torch.Tensor,
    target: torch.Tensor,
    grad_zloss: torch.Tensor | None,
    lse_for_zloss: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
) -> torch.Tensor:
    ignored = target == ignore_index if ignore_index >= 0 else torch.zeros_like(target).bool()
    grad = log_prob.float().exp()
    grad.scatter_add_(1, target.clamp(min=0).unsqueeze(1), -torch.ones(target.numel(), 1))
    grad = grad.masked_fill(ignored.unsqueeze(1), 0.0) * grad_loss.float().reshape(-1, 1)
    return (grad / (~ignored).sum() if reduction == "mean" else grad).to(log_prob.dtype)
