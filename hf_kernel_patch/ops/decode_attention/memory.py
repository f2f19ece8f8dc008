"""Where a layer's keys and values lie, in a form that a captured CUDA graph can follow."""

from __future__ import annotations

import torch


class LayerCache:
    """The keys and values of one layer, and where kernels find them.

    A CUDA graph keeps the pointers that it was captured with. A kernel that reads the cache's place
    from ``address`` instead, whose own place never changes, serves other caches and caches that
    have grown by the same graph.

    Args:
        keys: (B, Hkv, capacity, Dk), contiguous, at a multiple of 16 bytes as torch allocates.
        values: (B, Hkv, capacity, Dv), likewise.
        start: the absolute position of slot 0; above 0 where old tokens were dropped.
        address: int64 of 4 elements to use for ``address``, such as a row of a table of all layers;
            a new tensor otherwise.

    Attributes:
        keys, values, start: as above; :meth:`point_to` exchanges them.
        address: int64 on the device: pointer of keys, pointer of values, capacity, start.
        counters: (B * Hkv), int32 on the device: how many programs of a launch have finished. Every
            launch leaves zeros. They are here since two launches that could disturb each other,
            those on two streams at once, must not share a cache either.
    """

    __slots__ = (
        "address",
        "batch",
        "counters",
        "dtype",
        "heads",
        "key_dim",
        "keys",
        "start",
        "value_dim",
        "values",
    )

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int = 0,
        address: torch.Tensor | None = None,
    ) -> None:
        _check(keys, values)
        if address is None:
            address = torch.empty(4, dtype=torch.int64, device=keys.device)
        self.keys, self.values, self.start, self.address = keys, values, start, address
        self.batch, self.heads, _, self.key_dim = keys.shape
        self.value_dim, self.dtype = values.shape[3], keys.dtype
        self.counters = torch.zeros(self.batch * self.heads, dtype=torch.int32, device=keys.device)
        self._write()

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return self.keys.shape[2]

    def hold(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Have these tensors at hand; ``address``, which is another's to write, stays."""
        self.keys, self.values, self.start = keys, values, start

    def let_go(self) -> None:
        """Keep no tensors alive; kernels that are given ``address`` alone need none."""
        del self.keys, self.values

    def point_to(self, keys: torch.Tensor, values: torch.Tensor, start: int = 0) -> None:
        """Take another cache, which may differ in capacity alone; graphs follow.

        The tensors that were here have to outlive what is still queued on other streams.
        """
        _check(keys, values)
        for old, new in ((self.keys, keys), (self.values, values)):
            same = old.shape[:2] == new.shape[:2] and old.shape[3] == new.shape[3]
            if not same or old.dtype != new.dtype or old.device != new.device:
                raise ValueError("another cache may differ in capacity alone")
        self.keys, self.values, self.start = keys, values, start
        self._write()

    def numbers(self) -> list[int]:
        """What ``address`` has to hold."""
        return numbers_of(self.keys, self.values, self.start)

    def _write(self) -> None:
        self.address.copy_(torch.tensor(self.numbers(), dtype=torch.int64))


def numbers_of(keys: torch.Tensor, values: torch.Tensor, start: int) -> list[int]:
    """What the address of a cache has to hold: where it is, its capacity, its first position."""
    return [keys.data_ptr(), values.data_ptr(), keys.shape[2], start]


def _check(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raise ValueError for tensors that a kernel would misread by their addresses."""
    if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        raise ValueError("keys and values differ in batch, heads, capacity or dtype")
    if keys.device != values.device:
        raise ValueError("keys and values differ in device")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values have to be contiguous")
    if keys.data_ptr() % 16 or values.data_ptr() % 16:
        raise ValueError("keys and values have to start at multiples of 16 bytes")
