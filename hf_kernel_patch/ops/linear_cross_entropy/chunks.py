"""The schedules: chunks of rows, and slices of the vocabulary with a second pass.

Both are products of PyTorch with one elementwise step between them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from hf_kernel_patch.ops._shared.launch import cdiv
from hf_kernel_patch.ops.linear_cross_entropy.function import Gradients, Problem, folds

#: Rows of a chunk that fill the matrix units, and roundings of a half precision sum that are few.
FILLING, FEW = 2048, 4
#: MiB of logits by default: of a chunk of rows; of a slice of the vocabulary, where gradients are
#: made, and in the pass before, where nothing else takes memory.
CHUNK_MIB, SLICE_MIB, FIRST_MIB = 1280, 160, 512
#: Rows of logits begin at multiples of so many elements.
PAD = 64
#: Chunks are multiples of so many rows, slices of so many tokens of the vocabulary.
STEP, SLICE_STEP = 128, 128


def chunk_rows(rows: int, vocabulary: int, itemsize: int, memory_mib: float | None) -> int:
    """Rows of a chunk: a quarter of all, filling the matrix units, within the memory."""
    within = int((memory_mib or CHUNK_MIB) * 2**20) // (vocabulary * itemsize)
    wanted = min(max(FILLING, cdiv(rows, FEW)), within) // STEP * STEP
    count = cdiv(rows, max(wanted, STEP))
    return min(rows, cdiv(cdiv(rows, max(count, 1)), STEP) * STEP if count > 1 else rows)


def slice_width(rows: int, vocabulary: int, itemsize: int, memory_mib: float) -> int:
    """Tokens of the vocabulary in a slice of the logits of all rows."""
    within = int(memory_mib * 2**20) // (max(rows, 1) * itemsize)
    count = cdiv(vocabulary, max(within // SLICE_STEP * SLICE_STEP, SLICE_STEP))
    return min(vocabulary, cdiv(cdiv(vocabulary, count), SLICE_STEP) * SLICE_STEP)


def buffer(rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised (rows, width) whose rows begin at multiples of PAD elements."""
    return like.new_empty(rows, cdiv(width, PAD) * PAD)[:, :width]


def logits_into(
    out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """out = hidden weight^T + bias, rounded once."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


@cache
def _sums_in_float32(device: str, dtype: torch.dtype) -> bool:
    """Whether this PyTorch multiplies half precision into a float32 sum on the device."""
    try:
        one = torch.ones(16, 16, dtype=dtype, device=device)
        total = torch.zeros(16, 16, device=device)
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
        return bool((total == 16).all())
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """total = (0 if first else total) + left right, summed in total's dtype."""
    if total.dtype is left.dtype:
        if first:
            torch.mm(left, right, out=total)
        else:
            torch.addmm(total, left, right, out=total)
    elif _sums_in_float32(left.device.type, left.dtype):
        beta = 0 if first else 1
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


def early(
    problem: Problem,
    factor: torch.Tensor,
    needed: tuple[bool, ...],
    loss_and_grad: Callable[..., None],
) -> tuple[torch.Tensor, Gradients]:
    """Sums and gradients in one pass over chunks of rows.

    ``loss_and_grad(logits, targets, factor, out, gradient, options)`` writes, for each row, loss,
    likeliest-is-right and entropy into ``out`` (3, rows), and the logits' gradient in their place.
    """
    hidden, weight, bias, targets, options = problem
    (rows, width), vocabulary = hidden.shape, len(weight)
    size = chunk_rows(rows, vocabulary, hidden.itemsize, options.memory_mib)
    out = torch.zeros(3, rows, dtype=torch.float32, device=hidden.device)
    chunks = range(0, rows, size or 1)
    # Of float16 the caller rounds, once it has scaled them.
    folded = folds(hidden.dtype)
    wide = not folded or (weight.itemsize < 4 and (options.exact or len(chunks) > FEW))
    sums = torch.float32 if wide else weight.dtype
    kept = hidden.dtype if folded else torch.float32
    grad_hidden = hidden.new_empty(hidden.shape, dtype=kept) if needed[0] else None
    make = torch.empty if len(chunks) else torch.zeros
    grad_weight = make(vocabulary, width, dtype=sums, device=hidden.device) if needed[1] else None
    grad_bias = torch.zeros(vocabulary, device=hidden.device) if needed[2] else None
    held = buffer(size, vocabulary, hidden)
    for begin in chunks:
        part = slice(begin, min(begin + size, rows))
        x, logits = hidden[part], held[: part.stop - begin]
        logits_into(logits, x, weight, bias)
        loss_and_grad(logits, targets[part], factor, out[:, part], any(needed), options)
        if grad_hidden is not None:
            add_product(grad_hidden[part], logits, weight, True)
        if grad_weight is not None:
            add_product(grad_weight, logits.t(), x, begin == 0)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=torch.float32)
    del held
    if grad_weight is not None and folded:
        grad_weight = grad_weight.to(weight.dtype)
    if grad_bias is not None and folded:
        grad_bias = grad_bias.to(weight.dtype)
    return out.sum(1), [grad_hidden, grad_weight, grad_bias]


def sums(
    problem: Problem, observe: Callable[..., None], close: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and logs of the denominators, by slices of the vocabulary.

    ``observe(logits, begin, targets, state, options)`` takes a slice into the rows' ``state``
    (6, rows); ``close(state, targets, vocabulary, options)`` makes of it losses,
    likeliest-is-right, entropies and the denominators' logs in two parts, (5, rows).
    """
    hidden, weight, bias, targets, options = problem
    rows, vocabulary = len(hidden), len(weight)
    size = slice_width(rows, vocabulary, hidden.itemsize, options.memory_mib or FIRST_MIB)
    state = torch.zeros(6, rows, dtype=torch.float32, device=hidden.device)
    state[0] = -float("inf")
    held = buffer(rows, size, hidden)
    for begin in range(0, vocabulary, size):
        part = slice(begin, min(begin + size, vocabulary))
        logits = held[:, : part.stop - begin]
        logits_into(logits, hidden, weight[part], None if bias is None else bias[part])
        observe(logits, begin, targets, state, options)
    found = close(state, targets, vocabulary, options)
    return found[:3].sum(1), found[3:].contiguous()


def late(
    problem: Problem,
    logs: torch.Tensor,
    factor: torch.Tensor,
    needed: tuple[bool, ...],
    logits_grad: Callable[..., None],
) -> Gradients:
    """Gradients by slices of the vocabulary, each part of the weight's rounded once.

    ``logits_grad(logits, begin, targets, logs, factor, vocabulary, options)`` writes the gradient
    of the logits in their place.
    """
    hidden, weight, bias, targets, options = problem
    rows, vocabulary = len(hidden), len(weight)
    size = slice_width(rows, vocabulary, hidden.itemsize, options.memory_mib or SLICE_MIB)
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    grad_weight = torch.empty_like(weight) if needed[1] else None
    grad_bias = torch.empty_like(bias) if needed[2] and bias is not None else None
    held = buffer(rows, size, hidden)
    for begin in range(0, vocabulary, size):
        part = slice(begin, min(begin + size, vocabulary))
        logits = held[:, : part.stop - begin]
        logits_into(logits, hidden, weight[part], None if bias is None else bias[part])
        logits_grad(logits, begin, targets, logs, factor, vocabulary, options)
        if needed[0]:
            add_product(total, logits, weight[part], begin == 0)
        if grad_weight is not None:
            torch.mm(logits.t(), hidden, out=grad_weight[part])
        if grad_bias is not None:
            grad_bias[part] = logits.sum(0, dtype=torch.float32)
    del held
    return [total.to(hidden.dtype) if needed[0] else None, grad_weight, grad_bias]
