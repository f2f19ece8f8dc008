"""linear_cross_entropy by others."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.workloads.ops import Arguments
from benchmarks.workloads.peers.builder import Built
from hf_kernel_patch.ops.linear_cross_entropy.reference import shifted


def eager_loss(a: Arguments) -> Built:
    from transformers.loss.loss_utils import ForCausalLMLoss

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        return ForCausalLMLoss(F.linear(hidden, weight), labels, len(weight))

    return loss, (a.hidden, a.weight, a.labels)


def torch_loss(a: Arguments) -> Built:
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        targets = shifted(labels, None, -100)
        total = F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets, reduction="sum", options=options
        )
        return total / (targets != -100).sum()

    return loss, (a.hidden, a.weight, a.labels)


def liger_loss(a: Arguments) -> Built:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        targets = shifted(labels, None, -100)
        return liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, targets)

    return loss, (a.hidden, a.weight, a.labels)


def cut_loss(a: Arguments) -> Built:
    from cut_cross_entropy import linear_cross_entropy

    return lambda *tensors: linear_cross_entropy(*tensors, shift=True), (
        a.hidden,
        a.weight,
        a.labels,
    )
