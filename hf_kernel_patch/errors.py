"""The exceptions a user can meet. A wrong name or type is a plain ValueError or TypeError."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class KernelPatchError(RuntimeError):
    """A patch could not be applied or taken back; the message names the place and the reason."""


class KernelUnavailableError(KernelPatchError):
    """A kernel was asked for by name and cannot run here; the message says why."""


class ForeignPatchError(KernelPatchError):
    """Somebody else has patched over a place of ours, so it could not be restored."""


class KernelPatchWarning(UserWarning):
    """A kernel or a target was left out; with ``strict=True`` this would have been an error."""


def unknown(kind: str, value: str, known: Iterable[str], source: str = "") -> ValueError:
    """The ValueError for a name that does not exist, with the nearest names and all of them.

    ``source`` says where the name was given.
    """
    names = sorted(known)
    near = get_close_matches(value, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    where = f" in {source}" if source else ""
    return ValueError(f"unknown {kind} {value!r}{where}{hint} Known: {', '.join(names)}")
