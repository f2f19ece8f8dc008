"""One run of a bisection: which sites may be patched, and which were.

``bisect(function)`` sets it in this process. ``hf-kernel-patch bisect`` sets it in the processes of
the program that it runs: by two files in a folder that a variable names. Every process reads the
one and adds to the other at once, since it may be killed later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hf_kernel_patch import settings

#: In the folder: what may be patched, as JSON, and the names of patched sites, one a line.
ALLOWED, PATCHED = "allowed.json", "patched.txt"


@dataclass(frozen=True)
class Trial:
    """What one run may patch: ``only`` these sites (None for all), ``without`` those."""

    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()
    #: The sites that were patched in this process, in their order.
    patched: dict[str, None] = field(default_factory=dict, compare=False)

    def allows(self, site: str) -> bool:
        """Whether a site may be patched."""
        return site not in self.without and (self.only is None or site in self.only)

    def write(self, folder: Path) -> None:
        """Tell the processes of a program of it."""
        only = None if self.only is None else sorted(self.only)
        content = json.dumps({"only": only, "without": sorted(self.without)})
        (folder / ALLOWED).write_text(content, encoding="utf-8")
        (folder / PATCHED).write_text("", encoding="utf-8")


_in_this_process: list[Trial] = []


@contextmanager
def trying(trial: Trial) -> Iterator[None]:
    """Hold what is patched in this process to a trial."""
    _in_this_process.append(trial)
    try:
        yield
    finally:
        _in_this_process.pop()


def current() -> Trial | None:
    """The trial of this moment, if a bisection runs."""
    if _in_this_process:
        return _in_this_process[-1]
    folder = settings.bisection()
    if folder is None:
        return None
    found = json.loads((folder / ALLOWED).read_text(encoding="utf-8"))
    only = found["only"]
    return Trial(None if only is None else frozenset(only), frozenset(found["without"]))


def tell_patched(site: str) -> None:
    """Let the bisection know that a site is patched, if one runs."""
    if _in_this_process:
        _in_this_process[-1].patched[site] = None
    elif (folder := settings.bisection()) is not None:
        with open(folder / PATCHED, "a", encoding="utf-8") as file:
            file.write(f"{site}\n")


def patched_in(folder: Path) -> list[str]:
    """The sites that the processes of a program have patched."""
    return list(dict.fromkeys((folder / PATCHED).read_text(encoding="utf-8").splitlines()))
