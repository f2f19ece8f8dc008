"""The exceptions a user can meet. A wrong name or type is a plain ValueError or TypeError."""

from __future__ import annotations

import reprlib
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from itertools import islice
from types import FrameType


class KernelPatchError(RuntimeError):
    """A patch could not be applied or taken back; the message names the place and the reason."""


class KernelUnavailableError(KernelPatchError):
    """A kernel was asked for by name and cannot run here; the message says why."""


class ForeignPatchError(KernelPatchError):
    """Somebody else has patched over a place of ours, so it could not be restored."""


class KernelPatchWarning(UserWarning):
    """A kernel or a site was left out; with ``strict=True`` this would have been an error."""


#: Packages that call this one, or are called by it, on behalf of a user's line.
BETWEEN = {
    "hf_kernel_patch",
    "wrapt",
    "transformers",
    "torch",
    "accelerate",
    "peft",
    "trl",
    "lightning",
    "pytorch_lightning",
}


def warn(message: str, category: type[Warning] = KernelPatchWarning) -> None:
    """Warn at the line of the user that led here, through whatever packages it came."""
    at: FrameType = sys._getframe(1)
    while at.f_back is not None and _is_between(at):
        at = at.f_back
    warnings.warn_explicit(
        message,
        category,
        at.f_code.co_filename,
        at.f_lineno,
        at.f_globals.get("__name__", "<unknown>"),
        at.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_between(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in BETWEEN or package in sys.stdlib_module_names


def raise_if_blocked(blocked: list[str]) -> None:
    """One error that names every place where somebody else's patch stayed."""
    if blocked:
        raise ForeignPatchError(
            "everything else is restored, but somebody patched over these: "
            + listed(dict.fromkeys(blocked), "; ")
        )


#: What a value may take of a message.
LONGEST = 200
#: How many names a message lists.
MOST = 100


class _Short(reprlib.Repr):
    """Looks at a few items, two levels deep: aliases make a small file an endless value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = LONGEST

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out numbers of thousands of digits.
        return repr(x) if x.bit_length() <= 4 * LONGEST else f"<int of {x.bit_length()} bits>"

    def repr_instance(self, x: object, level: int) -> str:
        # What reprlib knows by the names of their types alone.
        if isinstance(x, Mapping):
            return self.repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)
        if isinstance(x, Sequence | Set) and not isinstance(x, str | bytes | bytearray | range):
            return self.repr_list(list(islice(x, self.maxlist + 1)), level)
        return super().repr_instance(x, level)


_short = _Short()


def shown(value: object) -> str:
    """``repr(value)`` for a message, cut to ``LONGEST`` characters whatever a user has given."""
    text = _short.repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def cut(text: str, longest: int = LONGEST) -> str:
    """A text for a message: of a long one the beginning and the end, as of a path."""
    half = longest // 2 - 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """The known names that are most like one, whatever the case of their letters."""
    by_folded: dict[str, list[str]] = {}
    for one in known:
        by_folded.setdefault(one.casefold(), []).append(one)
    near = get_close_matches(name[:LONGEST].casefold(), by_folded, n=3, cutoff=cutoff)
    return [one for folded in near for one in by_folded[folded]][:3]


def listed(texts: Iterable[str], between: str) -> str:
    """Texts in a row, of many the first and how many more there are."""
    every = [cut(text, 5 * LONGEST) for text in texts]
    more = [f"and {len(every) - MOST} more"] if len(every) > MOST else []
    return between.join([*every[:MOST], *more])


def unknown(kind: str, value: object, known: Iterable[str], source: str = "") -> ValueError:
    """The ValueError for a name that does not exist, with the nearest names and all of them.

    Of hundreds it tells how many there are. ``source`` says where the name was given.
    """
    names = sorted(known)
    name = value if isinstance(value, str) else shown(value)
    near = " or ".join(map(repr, nearest(name, names)))
    where = f" in {source}" if source else ""
    hint = f"; did you mean {near}?" if near else "."
    all_names = ", ".join(map(cut, names)) if len(names) <= MOST else f"{len(names)} names"
    return ValueError(f"unknown {kind} {shown(name)}{where}{hint} Known: {all_names or 'none'}")
