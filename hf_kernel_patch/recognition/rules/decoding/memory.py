"""Where keys and values live while tokens are decoded: memory that grows by steps.

A DynamicCache makes new tensors at every token. Here each of its layers gets memory with room for
more, and after each token the layer's ``keys`` and ``values`` are set to the part of it that is
filled. So the cache has the right contents whenever it is looked at, and all that is done to it
by others is seen: what stands there is then no longer what was set.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_kernel_patch.recognition.rules.decoding.caches import filled

if TYPE_CHECKING:
    import torch

#: Memory comes in rows of this many tokens, with room for as many more at least ...
STEP = 64
#: ... and for this part of what is there: it is copied each time that it is full.
ROOM = 8
#: The least number of tokens that a graph is made for.
SMALLEST = 256


def capacity_for(tokens: int) -> int:
    """How many tokens memory is made for that has to hold so many."""
    return -(-(tokens + max(STEP, tokens // ROOM)) // STEP) * STEP


def bucket_for(tokens: int) -> int:
    """How many tokens a graph looks at that has to look at so many: a power of two."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())


class Kind(NamedTuple):
    """What one graph needs to know of a layer's memory.

    Attributes:
        heads: how many heads of keys there are.
        key_dim, value_dim: the widths of a key and a value.
        dtype: theirs.
        window: how many tokens a sliding window has, this one among them; 0 without one.
        size: how many slots the graph looks at.
    """

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int
    size: int


class _Layer:
    """The memory of one layer of a cache; ``start`` is the position of its first slot."""

    def __init__(self, shown: Any, length: int):
        self.shown = weakref.ref(shown)
        self.window = int(getattr(shown, "sliding_window", 0)) if shown.is_sliding else 0
        keys, values = shown.keys, shown.values
        self.start = length - keys.shape[2]
        self._fill(keys, values, keys.shape[2])
        self.show(shown, length)
        #: Somebody who sets a method on the layer makes it one more.
        self.attributes = len(vars(shown))

    def _fill(self, keys: torch.Tensor, values: torch.Tensor, count: int) -> None:
        """New memory with the last ``count`` tokens of these."""
        import torch

        with torch.inference_mode(False), torch.no_grad():
            self.keys, self.values = _with_room(keys, count), _with_room(values, count)

    def show(self, shown: Any, length: int) -> None:
        """Set the layer's keys and values to what is filled after so many tokens."""
        first = max(length - self.window + 1, self.start) if self.window else self.start
        self.seen = seen = (
            self.keys.narrow(2, first - self.start, length - first),
            self.values.narrow(2, first - self.start, length - first),
        )
        shown.keys, shown.values = seen
        if self.window:
            shown.cumulative_length = length

    def is_shown_by(self, shown: Any, length: int) -> bool:
        """Whether a layer still shows what was last set, and nothing else."""
        keys, values = self.seen
        known: Any = self.shown()
        return (
            shown is known
            and keys is shown.keys
            and values is shown.values
            and len(vars(shown)) == self.attributes
            and (not self.window or shown.cumulative_length == length)
        )

    def make_room(self, length: int) -> bool:
        """Make room for the token after so many; whether the memory is another one now."""
        if length - self.start < self.keys.shape[2]:
            return False
        count = min(length - self.start, self.window - 1) if self.window else length - self.start
        self._fill(self.keys, self.values, count)
        self.start = length - count
        return True

    def kind(self, length: int) -> Kind:
        """What a graph for the token after so many has to know."""
        slots = length + 1
        if self.window:
            slots = min(slots, capacity_for(self.window))
        keys, values = self.keys, self.values
        return Kind(
            keys.shape[1],
            keys.shape[3],
            values.shape[3],
            keys.dtype,
            self.window,
            bucket_for(slots),
        )


def _with_room(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Memory with room, whose first slots have the last ``count`` tokens of (B, H, S, D)."""
    batch, heads, length, width = tensor.shape
    made = tensor.new_empty(batch, heads, capacity_for(count), width)
    made[:, :, :count].copy_(tensor[:, :, length - count :])
    return made


#: Every ``kinds`` so far -> a number, which costs less to compare.
_numbers: dict[tuple[Kind | None, ...], int] = {}


class Memory:
    """The memory of a cache of transformers.

    Attributes:
        layers: one for each of the cache's layers, None for one that holds nothing.
        length: how many tokens the cache has seen.
        version: another number whenever some memory is at another address.
    """

    def __init__(self, cache: Any, length: int):
        self.layers = [_Layer(one, length) if filled(one) else None for one in cache.layers]
        self.length, self.version = length, 0
        self._attributes = len(vars(cache))
        self._full_at = 0
        #: What a graph has to know of the layers for tokens up to a position, and its number.
        self._kinds_up_to, self._kinds, self._number = -1, tuple[Kind | None, ...](), 0

    def is_shown_by(self, cache: Any) -> bool:
        """Whether the cache still shows what was last set, and nothing else."""
        shown = cache.layers
        if len(shown) != len(self.layers) or len(vars(cache)) != self._attributes:
            return False
        return all(
            not filled(one) if mine is None else mine.is_shown_by(one, self.length)
            for mine, one in zip(self.layers, shown)
        )

    def make_room(self) -> None:
        """Make room for one more token in every layer."""
        if self.length < self._full_at:
            return
        layers = [one for one in self.layers if one is not None]
        moved = [one.make_room(self.length) for one in layers]
        self.version += any(moved)
        self._full_at = min(one.start + one.keys.shape[2] for one in layers)

    def advance(self, cache: Any) -> None:
        """One more token is in the memory: the cache shows it."""
        self.length += 1
        for mine, one in zip(self.layers, cache.layers):
            if mine is not None:
                mine.show(one, self.length)

    def kinds(self) -> tuple[Kind | None, ...]:
        """What a graph for the next token has to know of each layer."""
        if self.length > self._kinds_up_to:
            kinds = (None if one is None else one.kind(self.length) for one in self.layers)
            self._kinds = tuple(kinds)
            self._kinds_up_to = bucket_for(self.length + 1) - 1
            self._number = _numbers.setdefault(self._kinds, len(_numbers))
        return self._kinds

    def number(self) -> int:
        """A number that stands for ``kinds`` and for the longest bucket."""
        self.kinds()
        return self._number * 64 + self._kinds_up_to.bit_length()

    def table(self, device: torch.device) -> torch.Tensor:
        """(layers, 4) on the device: addresses of keys and values, capacity, first position."""
        import torch

        from hf_kernel_patch.ops.decode_attention.memory import numbers_of

        rows = [
            [0, 0, 0, 0] if one is None else numbers_of(one.keys, one.values, one.start)
            for one in self.layers
        ]
        return torch.tensor(rows, dtype=torch.int64).to(device)
