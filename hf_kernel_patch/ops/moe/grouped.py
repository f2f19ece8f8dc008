"""Tokens sorted by expert, and products of every expert's rows, in plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

#: The weights of one product: stacked (E, N, K), or a list of E (N, K).
Weights: TypeAlias = torch.Tensor | list[torch.Tensor]


class Plan(NamedTuple):
    """Which rows of the (token, expert) pairs, sorted by expert, belong to which expert."""

    order: torch.Tensor  #: the pairs (T * K) by expert, those of no expert here left out
    token: torch.Tensor  #: their tokens
    offsets: torch.Tensor  #: (E,) int32, the row after each expert's last one
    pairs: int
    slots: int  #: K
    complete: bool  #: whether every pair has a row

    def groups(self) -> list[tuple[int, int, int]]:
        """(expert, first row, row after the last) of every expert that has a row."""
        ends = self.offsets.tolist()
        starts = [0, *ends[:-1]]
        return [(e, s, t) for e, (s, t) in enumerate(zip(starts, ends, strict=True)) if t > s]

    def combine(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, H) -> (T, H): the weighted sum of every token's rows, in float32 within."""
        spread = rows.new_empty if self.complete else rows.new_zeros
        pairs = spread((self.pairs, rows.shape[-1]))
        pairs[self.order] = rows
        pairs = pairs.view(-1, self.slots, rows.shape[-1])
        if weights is None:
            return pairs.sum(1)
        if weights.dtype == rows.dtype:
            return torch.bmm(weights.unsqueeze(1), pairs).squeeze(1)
        return (pairs * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def plan_of(index: torch.Tensor, experts: int) -> Plan:
    """The plan of routes (T, K) over so many experts."""
    flat = index.reshape(-1)
    pairs, slots = len(flat), index.shape[-1]
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts]
    offsets = counts.cumsum(0, dtype=torch.int32)
    rows = int(offsets[-1])
    order = order if rows == pairs else order[:rows]
    return Plan(order, order // slots, offsets, pairs, slots, rows == pairs)


def takes_grouped(*tensors: Any) -> bool:
    """Whether torch's grouped product takes these tensors; it needs rows of whole 16 bytes."""
    return hasattr(F, "grouped_mm") and all(
        tensor.stride(-1) == 1
        and tensor.stride(-2) * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def rows_times(plan: Plan, x: torch.Tensor, weights: Weights, turn: bool) -> torch.Tensor:
    """Every row of x (rows, ...) times its expert's weight, transposed if ``turn``."""
    if isinstance(weights, torch.Tensor) and takes_grouped(x, weights):
        return F.grouped_mm(x, weights.mT if turn else weights, offs=plan.offsets)
    out = x.new_empty((len(x), weights[0].shape[0 if turn else 1]))
    for expert, start, end in plan.groups():
        weight = weights[expert]
        torch.mm(x[start:end], weight.t() if turn else weight, out=out[start:end])
    return out
