"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F


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
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Cross-entropy of the next token, from the last hidden states and the head's weight.

    Args:
        hidden: (B, S, H).
        weight: (V, H) of the head.
        labels: (B, S) token ids; position t is scored against label t + 1.
        scale: the logits are multiplied by it (Granite divides them by ``logits_scaling``).
        softcap: c tanh(logits / c), as in Gemma 2.
        num_items_in_batch: divide the sum of the losses by this, as the Trainer does under
            gradient accumulation, instead of by the number of labels that count.
        ignore_index: labels of this value do not count.
        shift_labels: (B, S) labels that are shifted already; ``labels`` are not read then.
        dtype: of the arithmetic from the logits on.

    Returns:
        The loss, a scalar in ``dtype``.
    """
    targets = shifted(labels, shift_labels, ignore_index)
    logits = F.linear(hidden.to(dtype), weight.to(dtype)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = F.cross_entropy(
        logits.flatten(0, -2), targets, ignore_index=ignore_index, reduction="sum"
    )
    return total / items(targets, num_items_in_batch, ignore_index)


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
