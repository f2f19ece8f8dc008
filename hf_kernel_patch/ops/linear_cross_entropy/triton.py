"""linear_cross_entropy in Triton, between products of PyTorch.

Eager calls launch without torch's dispatcher; torch.compile sees operators of the dispatcher.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import triton

from hf_kernel_patch.ops._shared.launch import Launch, cdiv, launcher, processors
from hf_kernel_patch.ops._shared.logits.triton import (
    logits_grad_kernel,
    observe_kernel,
    rows_kernel,
    scale_kernel,
)
from hf_kernel_patch.ops.linear_cross_entropy import chunks
from hf_kernel_patch.ops.linear_cross_entropy.chunks import PAD
from hf_kernel_patch.ops.linear_cross_entropy.function import (
    Backend,
    Options,
    loss_by,
)
from hf_kernel_patch.ops.linear_cross_entropy.operator import operator_of
from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics

#: Elements a program takes at a time, its warps, and programs a multiprocessor. Many warps a row,
#: so that few rows are in flight and the second pass over a row finds it in the cache.
BLOCK, WARPS, IN_FLIGHT = 16384, 32, 1
SLICE_BLOCK, SLICE_WARPS = 8192, 8


@cache
def _launcher(kernel: Any, dtype: torch.dtype, warps: int, *static: Any) -> Launch:
    """The launcher for logits of a dtype."""
    return launcher(kernel, static, warps)


def _flags(options: Options) -> tuple[bool, bool, bool]:
    return options.softcap is not None, options.label_smoothing != 0.0, options.metrics


def _stride(logits: torch.Tensor) -> int:
    return logits.stride(0) // PAD


def _block(width: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(width)))


def _loss_and_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    factor: torch.Tensor,
    out: torch.Tensor,
    gradient: bool,
    options: Options,
) -> None:
    width, block = logits.shape[1], _block(logits.shape[1], BLOCK)
    static = width, *_flags(options), gradient, PAD, block
    launch = _launcher(rows_kernel, logits.dtype, min(WARPS, max(4, block // 512)), *static)
    numbers = (
        len(logits),
        out.stride(0),
        _stride(logits),
        options.ignore_index,
        options.scale,
        options.softcap or 0.0,
        options.label_smoothing,
        options.z_loss,
    )
    programs = min(len(logits), IN_FLIGHT * processors(logits.device))
    launch(programs, (logits, targets, factor, out), numbers)


def _observe(
    logits: torch.Tensor, begin: int, targets: torch.Tensor, state: torch.Tensor, options: Options
) -> None:
    width, block = logits.shape[1], _block(logits.shape[1], SLICE_BLOCK)
    static = width, *_flags(options), PAD, block
    launch = _launcher(observe_kernel, logits.dtype, SLICE_WARPS, *static)
    numbers = (
        len(logits),
        _stride(logits),
        options.ignore_index,
        begin,
        options.scale,
        options.softcap or 0.0,
    )
    launch(len(logits), (logits, targets, state), numbers)


def _close(
    state: torch.Tensor, targets: torch.Tensor, vocabulary: int, options: Options
) -> torch.Tensor:
    high, total, label, plain, heavy, best = state
    counted = targets != options.ignore_index
    # As where a label is looked up in a whole row.
    label = label.masked_fill(counted & ((targets < 0) | (targets >= vocabulary)), float("nan"))
    log = total.log()
    loss = (high - label) + log + options.label_smoothing * (label - plain / vocabulary)
    loss += options.z_loss * (high + log).square()
    found = torch.stack([loss, best == targets, (high - heavy / total) + log])
    return torch.cat([torch.where(counted, found, 0.0), high[None], log[None]])


def _logits_grad(
    logits: torch.Tensor,
    begin: int,
    targets: torch.Tensor,
    logs: torch.Tensor,
    factor: torch.Tensor,
    vocabulary: int,
    options: Options,
) -> None:
    width, block = logits.shape[1], _block(logits.shape[1], SLICE_BLOCK)
    static = width, vocabulary, options.softcap is not None, PAD, block
    launch = _launcher(logits_grad_kernel, logits.dtype, SLICE_WARPS, *static)
    numbers = (
        len(logits),
        _stride(logits),
        options.ignore_index,
        begin,
        options.scale,
        options.softcap or 0.0,
        options.label_smoothing,
        options.z_loss,
    )
    launch(len(logits), (logits, targets, logs, factor), numbers)


def _scale_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A dense tensor times a scalar tensor, in place, without asking the device for its value."""
    if tensor.numel():
        unit = 1 if tensor.numel() % 8 else 8  # from which Triton knows that 16 bytes are one load
        launch = _launcher(scale_kernel, tensor.dtype, 8, unit, 4096)
        programs = min(cdiv(tensor.numel(), 4096), 8 * processors(tensor.device))
        launch(programs, (tensor, factor), (tensor.numel(),))
    return tensor


BACKEND = Backend(
    partial(chunks.early, loss_and_grad=_loss_and_grad),
    partial(chunks.sums, observe=_observe, close=_close),
    partial(chunks.late, logits_grad=_logits_grad),
    _scale_,
)
_operator = operator_of(BACKEND, "hf_kernel_patch::linear_cross_entropy")


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

    The logits are rounded to hidden's dtype, as the head of the original gives them, and exist a
    chunk at a time; rows whose label is ``ignore_index`` cost nothing. The gradients are made in
    the forward, where the weight's is rounded to bfloat16 at most four times, and once more where
    the loss's own gradient is then no power of two.

    Args:
        exact: make the gradients in the backward, the weight's rounded once, for which the logits
            are computed a second time.
        memory_mib: MiB that the logits in hand may take; by default a quarter of them, from what
            fills the matrix units up to 1280, and 160 with ``exact``.
    """
    found: Any = loss_by(
        BACKEND,
        hidden,
        weight,
        labels,
        bias,
        num_items_in_batch,
        shift_labels,
        Options(**options),
        _operator if torch.compiler.is_compiling() else None,
    )
    return found
