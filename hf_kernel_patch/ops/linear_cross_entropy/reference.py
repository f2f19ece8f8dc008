"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F


class Metrics(NamedTuple):
    """What the logits of one batch say, over the labels that count; scalars without gradients."""

    #: The share of the labels that are the likeliest token, of equals the first.
    token_accuracy: torch.Tensor
    #: Of the distributions over the vocabulary, in nats.
    mean_entropy: torch.Tensor


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    metrics: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor | tuple[torch.Tensor, Metrics]:
    """Cross-entropy of the next token, from the last hidden states and the head's weight.

    Args:
        hidden: (B, S, H).
        weight: (V, H) of the head.
        labels: (B, S) token ids; position t is scored against label t + 1.
        bias: (V,) of the head.
        scale: the logits are multiplied by it (Granite divides them by ``logits_scaling``).
        softcap: c tanh(logits / c), as in Gemma 2.
        num_items_in_batch: divide the sum of the losses by this, as the Trainer does under
            gradient accumulation, instead of by the number of labels that count.
        ignore_index: labels of this value do not count.
        shift_labels: (B, S) labels that are shifted already; ``labels`` are not read then.
        label_smoothing: the share of the target that all tokens have in common.
        z_loss: times the square of the log of the softmax's denominator, added to each token's
            loss (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
        metrics: return ``Metrics`` as well.
        dtype: of the arithmetic from the logits on.

    Returns:
        The loss, a scalar in ``dtype``.
    """
    targets = shifted(labels, shift_labels, ignore_index).to(hidden.device)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = logits.flatten(0, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = F.cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    if z_loss:
        total = total + z_loss * squared_logs(logits, targets, ignore_index)
    loss = total / items(targets, num_items_in_batch, ignore_index)
    return (loss, measured(logits, targets, ignore_index)) if metrics else loss


def squared_logs(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The sum that the z-loss is a multiple of: (N, V) logits, (N,) labels."""
    return torch.where(targets != ignore_index, logits.logsumexp(-1).square(), 0.0).sum()


@torch.no_grad()
def measured(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> Metrics:
    """The metrics of (N, V) logits and (N,) labels, a thousand rows at a time."""
    right = entropy = logits.new_zeros(())
    for part, target in zip(logits.split(1024), targets.split(1024)):
        counted = target != ignore_index
        log = part.log_softmax(-1)
        each = -torch.where(log.isneginf(), 0.0, log.exp() * log).sum(-1)
        right = right + (counted & (part.argmax(-1) == target)).sum()
        entropy = entropy + torch.where(counted, each, 0.0).sum()
    count = (targets != ignore_index).sum()
    return Metrics(right / count, entropy / count)


def shifted(
    labels: torch.Tensor | None, shift_labels: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """(B * S,) the label that each position is scored against."""
    if shift_labels is None:
        assert labels is not None, "either labels or shift_labels"
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


def items(
    targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None, ignore_index: int
) -> torch.Tensor | int:
    """What the sum of the losses is divided by."""
    if num_items_in_batch is None:
        return (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        return num_items_in_batch.to(targets.device)
    return num_items_in_batch
