"""Which rotary function is called after the norms, by its leaf."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple
from weakref import WeakKeyDictionary

from hf_kernel_patch.ops.rope.shapes import ELEMENTS, FIRST_HALF, HALVES, INTERLEAVED
from hf_kernel_patch.recognition.known import Leaf, known
from hf_kernel_patch.recognition.leaves.rotary import texts
from hf_kernel_patch.recognition.site import Swallowed
from hf_kernel_patch.recognition.source import innermost, original_of


class Rotation(NamedTuple):
    """What a rotary function computes, as far as the op can.

    Attributes:
        options: the op's last arguments, cast, upcast, pairs and angles, where they are not all its
            defaults.
        heads: where cos and sin get the dimension of the heads: 1 for (B, heads, S, D), 2 for the
            (S, heads, D) of packed images.
        partial: cos may be narrower than q.
        one_dtype: the result for k is of q's dtype.
    """

    options: tuple[bool | str, ...] = ()
    heads: int = 1
    partial: bool = False
    one_dtype: bool = False


#: The name of a leaf -> what it computes.
ROTATIONS = {
    "rope.full": Rotation(),
    "rope.partial": Rotation(partial=True),
    "rope.cast": Rotation((True, False, HALVES, ELEMENTS)),
    "rope.float32": Rotation((True, True, HALVES, ELEMENTS), one_dtype=True),
    "rope.vision": Rotation((True, True, HALVES, ELEMENTS), heads=2),
    "rope.pe_audio": Rotation((False, False, INTERLEAVED, FIRST_HALF)),
}
#: Which of a leaf's texts is meant, where it has several that compute different things.
_TEXTS = {"rope.vision": texts.VISION}
_UNKNOWN = f"the rotary function is no leaf {' or '.join(ROTATIONS)}"
#: Function -> its leaf and the helpers that it calls, or why it is none of these.
_seen: WeakKeyDictionary[Callable[..., object], tuple[str, tuple[Swallowed, ...]] | str] = (
    WeakKeyDictionary()
)


def rotation_of(function: Callable[..., object]) -> str:
    """The name in ``ROTATIONS`` of what a function, patched by us or not, computes as it is now.

    Or why it has none.
    """
    function = original_of(function)
    seen = _seen.get(function)
    if seen is None:
        seen = _seen[function] = _look_up(function)
    if isinstance(seen, str):
        return seen
    leaf, swallowed = seen
    for scope, name, value in swallowed:
        if scope is not None and scope.get(name) is not value:
            return f"{name} of the rotary function was replaced"
    return leaf


# torch.compile need not trace the look-up; what comes out is a constant to it.
rotation_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _look_up(function: Callable[..., object]) -> tuple[str, tuple[Swallowed, ...]] | str:
    home = sys.modules.get(getattr(innermost(function), "__module__", ""))
    for name in ROTATIONS if home is not None else ():
        leaf = known()[name]
        assert isinstance(leaf, Leaf)
        if _text_of(leaf, function, home).endswith(_TEXTS.get(name, "\n")):
            return name, leaf.swallowed(innermost(function), home)
    return _UNKNOWN


def _text_of(leaf: Leaf, function: Callable[..., object], home: ModuleType | None) -> str:
    """The text by which a leaf knows a function, or ""."""
    adapter = leaf.adapter_for(function, home)
    return next((text for text, made in leaf.variants.items() if made is adapter), "")
