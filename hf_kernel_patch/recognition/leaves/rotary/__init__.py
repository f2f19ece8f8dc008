"""The rotary function as the model families write it, in the signatures of transformers 4 and 5."""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

from hf_kernel_patch.recognition.leaves.rotary.table import LEAVES
from hf_kernel_patch.recognition.leaves.rotary.texts import ROTATE_HALF
from hf_kernel_patch.recognition.site import Swallowed
from hf_kernel_patch.recognition.source import innermost, original_of

__all__ = ["LEAVES", "PLAIN", "ROTATE_HALF", "why_not_plain"]

#: Those that ``rope`` does with no more than its first six arguments, in the dtype of q and cos.
PLAIN = LEAVES["rope.full"], LEAVES["rope.partial"]
#: function -> what it swallows, or why it is no plain rotary function.
_seen: WeakKeyDictionary[Any, tuple[Swallowed, ...] | str] = WeakKeyDictionary()


def why_not_plain(function: Any) -> str | None:
    """Why a function, patched by us or not, is none of the ``PLAIN`` as it is now, or None."""
    function = original_of(function)
    seen = _seen.get(function)
    if seen is None:
        home = sys.modules.get(getattr(innermost(function), "__module__", ""))
        fits = [leaf for leaf in PLAIN if home and leaf.why_not(function, home) is None]
        seen = (
            fits[0].swallowed(innermost(function), home)
            if fits
            else "the rotary function is no leaf rope.full or rope.partial"
        )
        _seen[function] = seen
    if isinstance(seen, str):
        return seen
    for scope, name, value in seen:
        if scope is not None and scope.get(name) is not value:
            return f"{name} of the rotary function was replaced"
    return None


# torch.compile need not trace the look-up.
why_not_plain._dynamo_marked_constant = True  # type: ignore[attr-defined]
