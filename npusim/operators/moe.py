"""Tokens sorted by expert, and put back in order, weighted and summed."""

from __future__ import annotations

from typing import Any

import torch

from . import operator
from .limit import FLOATS, Limit

_MOST_INDICES = 16777215
_MOST_CHOICES = 512

PERMUTE_TOKENS = Limit(
    "npu_moe_token_permute",
    "tokens are 2-D, float16, bfloat16 or float32",
    "数据类型支持float16、bfloat16、float32",
)
PERMUTE_INDICES = Limit(
    "npu_moe_token_permute",
    "indices are 1-D or 2-D, int32 or int64",
    "数据类型支持int32、int64",
)
PERMUTE_ROWS = Limit(
    "npu_moe_token_permute",
    "indices have a row for every token",
    "维度为2时shape为(num_tokens, topK)",
)
PERMUTE_VALUES = Limit(
    "npu_moe_token_permute",
    "there are fewer than 16777215 indices, each from 0 to 16777214",
    "元素值大于等于0且小于16777215",
)
PERMUTE_CHOICES = Limit(
    "npu_moe_token_permute",
    "a token has at most 512 indices",
    "The value of topK is less than or equal to 512",
    page="aclnnMoeTokenPermute, Constraints",
)
PERMUTE_PADDED = Limit(
    "npu_moe_token_permute", "padded_mode is False", "padded_mode当前仅支持False"
)
UNPERMUTE_TOKENS = Limit(
    "npu_moe_token_unpermute",
    "permuted tokens are 2-D, float16, bfloat16 or float32, a row for every index",
    "shape为(tokens_num * topK_num, hidden_size)",
)
UNPERMUTE_INDICES = Limit(
    "npu_moe_token_unpermute",
    "sorted indices are 1-D, int32",
    "数据类型支持int32",
)
UNPERMUTE_VALUES = Limit(
    "npu_moe_token_unpermute",
    "sorted indices are a permutation of the rows",
    "且没有重复索引",
)
UNPERMUTE_PROBS = Limit(
    "npu_moe_token_unpermute",
    "probs are (tokens, choices), float16, bfloat16 or float32",
    "shape为(tokens_num, topK_num)",
)
UNPERMUTE_CHOICES = Limit(
    "npu_moe_token_unpermute", "a token has at most 512 choices", "topK_num要求小于等于512"
)
UNPERMUTE_PADDED = Limit(
    "npu_moe_token_unpermute",
    "padded_mode is False and restore_shape None",
    "restore_shape当前仅支持None",
)


def _permute_limits(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None, padded_mode: bool
) -> None:
    PERMUTE_TOKENS.require(tokens.dim() == 2 and tokens.dtype in FLOATS)
    PERMUTE_INDICES.require(indices.dim() in (1, 2) and indices.dtype in (torch.int32, torch.int64))
    PERMUTE_ROWS.require(indices.shape[0] == tokens.shape[0])
    PERMUTE_CHOICES.require(_choices(indices) <= _MOST_CHOICES)
    in_range = bool(((indices >= 0) & (indices < _MOST_INDICES)).all())
    PERMUTE_VALUES.require(indices.numel() < _MOST_INDICES and in_range)
    PERMUTE_PADDED.require(not padded_mode)


def _unpermute_limits(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: list[int] | None,
) -> None:
    UNPERMUTE_INDICES.require(sorted_indices.dim() == 1 and sorted_indices.dtype == torch.int32)
    rows = sorted_indices.numel()
    UNPERMUTE_TOKENS.require(
        permuted_tokens.dim() == 2
        and permuted_tokens.dtype in FLOATS
        and permuted_tokens.shape[0] == rows
    )
    ordered = sorted_indices.long().sort().values
    UNPERMUTE_VALUES.require(bool(torch.equal(ordered, torch.arange(rows, device=ordered.device))))
    if probs is not None:
        UNPERMUTE_PROBS.require(
            probs.dim() == 2 and probs.dtype in FLOATS and probs.numel() == rows
        )
        UNPERMUTE_CHOICES.require(probs.shape[1] <= _MOST_CHOICES)
    UNPERMUTE_PADDED.require(not padded_mode and restore_shape is None)


def _choices(indices: torch.Tensor) -> int:
    return 1 if indices.dim() == 1 else indices.shape[1]


def _kept(total: int, num_out_tokens: int | None) -> int:
    """How many sorted rows stay: all for None and 0; negative numbers count from the end."""
    if not num_out_tokens:
        return total
    return min(total, num_out_tokens) if num_out_tokens > 0 else max(total + num_out_tokens, 0)


@operator("npu_moe_token_permute", limits=_permute_limits)
def permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H) tokens, (T, K) experts -> (T*K, H) rows sorted by expert, stably, and the (T*K,)
    int32 place of each choice among them."""
    order = torch.argsort(indices.reshape(-1), stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel())
    kept = order[: _kept(order.numel(), num_out_tokens)]
    return tokens[kept // _choices(indices)], places.int()


@operator("npu_moe_token_permute_grad")
def permute_grad(
    tokens: torch.Tensor,
    grad_permuted_tokens: torch.Tensor,
    indices: torch.Tensor,
    sorted_indices: torch.Tensor,
    padded_mode: bool,
) -> torch.Tensor:
    return permute_grad_v2(
        grad_permuted_tokens,
        sorted_indices,
        tokens.shape[0],
        tokens.dtype,
        _choices(indices),
        padded_mode,
    )


@operator("npu_moe_token_permute_grad_v2")
def permute_grad_v2(
    grad_permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topK: int,
    padded_mode: bool,
) -> torch.Tensor:
    """The sum of the gradients of a token's rows; dropped rows have none."""
    rows, width = grad_permuted_tokens.shape
    padded = torch.zeros(max(sorted_indices.numel(), rows), width)
    padded[:rows] = grad_permuted_tokens
    chosen = padded[sorted_indices.long()].view(tokens_size_0, num_topK, width)
    return chosen.sum(1).to(tokens_dtype)


@operator("npu_moe_token_unpermute", limits=_unpermute_limits)
def unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: None,
) -> torch.Tensor:
    """(T*K, H) rows, (T, K) weights -> (T, H), weighted and summed in float32."""
    chosen = _chosen(permuted_tokens, sorted_indices, probs)
    weighted = chosen if probs is None else chosen * probs.float().unsqueeze(-1)
    return weighted.sum(1).to(permuted_tokens.dtype)


@operator("_npu_moe_token_unpermute", limits=_unpermute_limits)
def unpermute_saving(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``unpermute``, and what its backward needs: the rows."""
    summed = unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    return summed, permuted_tokens


@operator("npu_moe_token_unpermute_grad")
def unpermute_grad(
    permuted_tokens: torch.Tensor,
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the rows, in their dtype, and of the weights, in theirs."""
    grad = grad_unpermuted_tokens.float().unsqueeze(1)
    chosen = _chosen(permuted_tokens, sorted_indices, probs)
    to_rows = torch.zeros(permuted_tokens.shape)
    weighted = grad.expand_as(chosen) if probs is None else grad * probs.float().unsqueeze(-1)
    to_rows[sorted_indices.long()] = weighted.reshape(-1, permuted_tokens.shape[1])
    to_probs = None if probs is None else (grad * chosen).sum(-1).to(probs.dtype)
    return to_rows.to(permuted_tokens.dtype), to_probs


@operator("npu_moe_token_unpermute_grad_v2")
def unpermute_grad_v2(
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: None,
    permuted_tokens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if permuted_tokens is None:
        shape = (permuted_tokens_size_0, grad_unpermuted_tokens.shape[1])
        permuted_tokens = torch.zeros(shape, dtype=permuted_tokens_dtype)
    arguments: Any = (sorted_indices, probs, padded_mode, restore_shape)
    return unpermute_grad(permuted_tokens, grad_unpermuted_tokens, *arguments)


def _chosen(
    permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None
) -> torch.Tensor:
    """(T, K, H): the rows in the order of the tokens' choices, in float32."""
    choices = 1 if probs is None else probs.shape[1]
    rows = permuted_tokens.float()[sorted_indices.long()]
    return rows.view(rows.shape[0] // choices, choices, rows.shape[1])
