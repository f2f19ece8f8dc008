"""The rotary function as the model families write it, in the signatures of transformers 4 and 5."""

from __future__ import annotations

import sys
from types import FunctionType
from weakref import WeakKeyDictionary

from hf_kernel_patch.recognition.leaves.rotary.table import LEAVES
from hf_kernel_patch.recognition.leaves.rotary.texts import ROTATE_HALF
from hf_kernel_patch.recognition.site import Swallowed
from hf_kernel_patch.recognition.source import innermost, original_of

__all__ = ["LEAVES", "PLAIN", "ROTATE_HALF", "why_not_plain"]

#: The leaves that need only the first six arguments of ``rope``, and compute in the dtype that q
#: and cos have.
PLAIN = LEAVES["rope.full"], LEAVES["rope.partial"]
#: Function -> the helpers that it calls, or why it is no plain rotary function.
_seen: WeakKeyDictionary[FunctionType, tuple[Swallowed, ...] | str] = WeakKeyDictionary()


def why_not_plain(function: FunctionType) -> str | None:
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
