"""When a head is a plain linear layer, and a loss one of transformers whose code is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_kernel_patch.recognition.modules import touched
from hf_kernel_patch.recognition.source import canonical, fingerprint, innermost

if TYPE_CHECKING:
    import torch
    from torch import nn

_LossFunction = Callable[..., "torch.Tensor"]

LOSS = """
def ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100,
                    shift_labels=None, **kwargs):
    logits = logits.float()
    if shift_labels is None:
        labels = nn.functional.pad(labels, (0, 1), value=ignore_index)
        shift_labels = labels[..., 1:].contiguous()
    logits = logits.view(-1, vocab_size)
    shift_labels = shift_labels.view(-1)
    shift_labels = shift_labels.to(logits.device)
    loss = fixed_cross_entropy(logits, shift_labels, num_items_in_batch, ignore_index, **kwargs)
    return loss
"""
MASKED = """
def ForMaskedLMLoss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100,
                    **kwargs):
    logits = logits.float()
    logits = logits.view(-1, vocab_size)
    labels = labels.view(-1)
    labels = labels.to(logits.device)
    loss = fixed_cross_entropy(logits, labels, num_items_in_batch, ignore_index, **kwargs)
    return loss
"""
FIXED = """
def fixed_cross_entropy(source, target, num_items_in_batch=None, ignore_index=-100, **kwargs):
    reduction = "sum" if num_items_in_batch is not None else "mean"
    loss = nn.functional.cross_entropy(
        source, target, ignore_index=ignore_index, reduction=reduction
    )
    if reduction == "sum":
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    return loss
"""


def why_not_head(head: nn.Module, vocabulary: int | None) -> str | None:
    """Why this head is not a plain product with a weight of its own, (vocabulary, hidden)."""
    from torch import nn

    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__module__}.{type(head).__qualname__}"
    if touched(head):
        return "a hook on the head needs the original"
    if nn.Linear.forward.__module__ != nn.Linear.__module__:
        return f"the forward of all linear layers is {nn.Linear.forward.__module__}'s"
    weight, bias = head.weight, head.bias
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 gathers the head's weight by hooks"
    if not isinstance(weight, nn.Parameter):
        return "the head's weight is not a parameter, as under FSDP1 or in a replica"
    if weight.dim() != 2 or weight.shape[0] != vocabulary or weight.shape[1] != head.in_features:
        return f"the head's weight is {tuple(weight.shape)}: sharded, or another vocabulary's"
    if bias is not None and not isinstance(bias, nn.Parameter):
        return "the head's bias is not a parameter"
    return None


class Loss:
    """The loss functions of transformers as they were when this was made: is their code known?"""

    def __init__(self) -> None:
        from transformers.loss import loss_utils

        self._module = loss_utils
        self._inner = loss_utils.fixed_cross_entropy
        self._shifting, self._aligned = loss_utils.ForCausalLMLoss, loss_utils.ForMaskedLMLoss
        known = (self._shifting, LOSS), (self._aligned, MASKED)
        self._unknown = {id(loss): _why_other(loss, source) for loss, source in known}
        self._other_inner = _why_other(self._inner, FIXED)

    def why_not(self, function: _LossFunction) -> str | None:
        """Why a model's loss function is another one."""
        from torch.nn import functional

        if function is not self._shifting and function is not self._aligned:
            return "the model has another loss function"
        if reason := self._unknown[id(function)] or self._other_inner:
            return reason
        if self._module.fixed_cross_entropy is not self._inner:
            return "fixed_cross_entropy of transformers was replaced"
        cross_entropy = functional.cross_entropy
        if cross_entropy.__module__ != "torch.nn.functional":
            return f"cross_entropy is {cross_entropy.__module__}'s"
        if hasattr(cross_entropy, "__wrapped__"):
            return "cross_entropy is wrapped"
        return None

    def is_aligned(self, function: _LossFunction) -> bool:
        """Whether a loss function scores each position against its own label."""
        return function is self._aligned


def _why_other(function: _LossFunction, source: str) -> str | None:
    code = innermost(function)
    if fingerprint(code) == canonical(source):
        return None
    return f"{code.__qualname__} of {code.__module__} is other code"
