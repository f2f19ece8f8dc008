"""Where a captured token finds the memory of one cache after another."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hf_kernel_patch.recognition.rules.decoding.memory import Memory

if TYPE_CHECKING:
    import torch


class Slots:
    """The memory that a graph works on: that of one cache after another."""

    def __init__(self, memory: Memory, device: torch.device):
        import torch

        from hf_kernel_patch.ops.decode_attention.memory import LayerCache

        self.kinds = memory.kinds()
        self._table = torch.zeros(len(self.kinds), 4, dtype=torch.int64, device=device)
        self.layers = [
            None if one is None else LayerCache(one.keys, one.values, one.start, row)
            for one, row in zip(memory.layers, self._table)
        ]
        #: What the table has the addresses of, and of which version.
        self._bound = weakref.ref(memory), memory.version
        self._let_go()

    def bind(self, memory: Memory) -> None:
        """Work on the memory of a cache from now on."""
        bound, version = self._bound
        if bound() is memory and version == memory.version:
            return
        self._table.copy_(memory.table(self._table.device))
        self._bound = weakref.ref(memory), memory.version

    @contextmanager
    def tensors_of(self, memory: Memory) -> Iterator[None]:
        """Have the tensors at hand, for code that is not given their addresses alone."""
        for mine, one in zip(self.layers, memory.layers):
            if mine is not None and one is not None:
                mine.hold(one.keys, one.values, one.start)
        try:
            yield
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Keep no cache's memory alive."""
        for mine in self.layers:
            if mine is not None:
                mine.let_go()
