"""Tokens sorted by expert, and products of every expert's rows, in plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

#: The weights of one product: stacked (E, N, K), or a list of E (N, K).
Weights: TypeAlias = torch.Tensor | list[torch.Tensor]


class Routing(NamedTuple):
    """The pairs of a token and an expert, sorted by expert: the rows of the grouped products.

    Pairs are numbered token * K + slot. Those of no expert here have no row.
    """

    pairs: torch.Tensor  #: (rows,) the pair of each row
    tokens: torch.Tensor  #: (rows,) the token of each row
    ends: torch.Tensor  #: (E,) int32, the row after each expert's last one
    pair_count: int  #: T * K
    top: int  #: K, experts of a token
    complete: bool  #: whether every pair has a row

    def groups(self) -> list[tuple[int, int, int]]:
        """(expert, first row, row after the last) of every expert that has a row."""
        ends = self.ends.tolist()
        starts = [0, *ends[:-1]]
        spans = enumerate(zip(starts, ends, strict=True))
        return [(expert, start, end) for expert, (start, end) in spans if end > start]

    def combine(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, H) -> (T, H): the weighted sum of every token's rows, in float32 within."""
        # An index assignment and not index_add: the sum has one order, whatever the routing.
        empty = rows.new_empty if self.complete else rows.new_zeros
        pairs = empty((self.pair_count, rows.shape[-1]))
        pairs[self.pairs] = rows
        pairs = pairs.view(-1, self.top, rows.shape[-1])
        if weights is None:
            return pairs.sum(1)
        if weights.dtype == rows.dtype:
            return torch.bmm(weights.unsqueeze(1), pairs).squeeze(1)
        return (pairs * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def route(index: torch.Tensor, experts: int) -> Routing:
    """Sort the pairs of ``index`` (T, K) over so many experts."""
    flat = index.reshape(-1)
    pair_count, top = len(flat), index.shape[-1]
    pairs = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts]
    ends = counts.cumsum(0, dtype=torch.int32)
    rows = int(ends[-1])
    complete = rows == pair_count
    pairs = pairs if complete else pairs[:rows]  # other ranks' experts have the largest index
    return Routing(pairs, pairs // top, ends, pair_count, top, complete)


def takes_grouped_mm(*tensors: Any) -> bool:
    """Whether torch's grouped product takes these tensors; it needs rows of whole 16 bytes."""
    return hasattr(F, "grouped_mm") and all(
        tensor.stride(-1) == 1
        and tensor.stride(-2) * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def grouped_product(
    routing: Routing, rows: torch.Tensor, weights: Weights, transpose: bool
) -> torch.Tensor:
    """Every row (rows, ...) times its expert's weight, transposed if ``transpose``."""
    if isinstance(weights, torch.Tensor) and takes_grouped_mm(rows, weights):
        return F.grouped_mm(rows, weights.mT if transpose else weights, offs=routing.ends)
    out = rows.new_empty((len(rows), weights[0].shape[0 if transpose else 1]))
    for expert, start, end in routing.groups():
        weight = weights[expert]
        torch.mm(rows[start:end], weight.t() if transpose else weight, out=out[start:end])
    return out
