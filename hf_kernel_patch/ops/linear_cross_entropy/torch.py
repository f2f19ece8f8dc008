"""linear_cross_entropy in plain PyTorch: logits of a chunk of rows at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.linear_cross_entropy import chunks
from hf_kernel_patch.ops.linear_cross_entropy.function import Backend, Options, loss_by
from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics

#: MiB of a chunk's logits by default; its float32 copy and gradient come on top.
CHUNK_MIB = 128


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, Metrics]:
    """As :func:`hf_kernel_patch.ops.linear_cross_entropy.reference.linear_cross_entropy`.

    Logits are rounded to hidden's dtype, as the head of the original gives them; gradients of the
    weight are summed in float32 where there are more than four chunks. Rows whose label is
    ``ignore_index`` cost nothing.

    Args:
        exact: sum the weight's gradient in float32 in any case.
        memory_mib: MiB that the logits in hand may take, CHUNK_MIB by default.
    """
    chosen = Options(**{"memory_mib": CHUNK_MIB, **options})
    found: Any = loss_by(
        BACKEND, hidden, weight, labels, bias, num_items_in_batch, shift_labels, chosen
    )
    return found


def _loss_and_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    factor: torch.Tensor,
    out: torch.Tensor,
    gradient: bool,
    options: Options,
) -> None:
    """What ``chunks.early`` asks for: of each row the sums, and the gradient of its logits."""
    smoothing, width = options.label_smoothing, logits.shape[1]
    y = logits.float()
    if options.scale != 1.0:
        y *= options.scale
    if options.softcap is not None:
        y = y.div_(options.softcap).tanh_().mul_(options.softcap)
    ignored = options.ignore_index
    counted = targets != ignored
    out[0] = F.cross_entropy(
        y, targets, ignore_index=ignored, reduction="none", label_smoothing=smoothing
    )
    if options.z_loss:
        log = y.logsumexp(-1)
        out[0] += torch.where(counted, options.z_loss * log.square(), 0.0)
    if not (gradient or options.metrics):
        return
    grad = torch.softmax(y, dim=-1)
    if options.metrics:
        entropy = -torch.where(grad > 0, grad * y.log_softmax(-1), 0.0).sum(-1)
        right = y.argmax(-1) == targets
        out[1:] = torch.where(counted, torch.stack([right.to(y.dtype), entropy]), 0.0)
    if not gradient:
        return
    if options.z_loss:
        grad *= (1.0 + 2.0 * options.z_loss * log)[:, None]
    if smoothing:
        grad -= smoothing / width
    index = targets.where(counted, 0)[:, None]
    grad.scatter_add_(1, index, grad.new_full(index.shape, smoothing - 1.0))
    if options.softcap is not None:
        grad *= 1.0 - y.div_(options.softcap).square_()
    grad *= factor * options.scale
    logits.copy_(grad.masked_fill_(~counted[:, None], 0.0))


BACKEND = Backend(
    partial(chunks.early, loss_and_grad=_loss_and_grad), None, None, torch.Tensor.mul_
)
