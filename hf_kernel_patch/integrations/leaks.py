"""The patches in force, and the end of some of them: for the plugin of pytest."""

from __future__ import annotations

import gc
from collections.abc import Iterable

from hf_kernel_patch import api
from hf_kernel_patch.patching import model_patch, watching
from hf_kernel_patch.patching.global_patch import Activation
from hf_kernel_patch.patching.ledger import ledger, undo_all
from hf_kernel_patch.patching.report import PatchReport

Patch = Activation | model_patch.Application
#: Rows of a patch that a message has.
MOST = 10


def in_force() -> list[Patch]:
    """Every patch in force, of all models and of single ones, oldest first."""
    with ledger.lock:
        alive = [one for one in model_patch.applications if one.alive()]
        return [*watching.active, *alive]


def still_alive(patches: Iterable[Patch]) -> list[Patch]:
    """Those in force after what is garbage has gone, such as a test's own model."""
    gc.collect()
    now = in_force()
    return [one for one in patches if one in now]


def describe(patch: Patch) -> str:
    """What a patch has replaced."""
    rows = patch.rows if isinstance(patch, Activation) else list(patch.rows.values())
    model = None if isinstance(patch, Activation) else patch.model()
    scope = "one model" if model is None else f"one {type(model).__name__}"
    lines = str(PatchReport(rows)).splitlines()
    more = [f"  and {len(lines) - 1 - MOST} rows more"] if len(lines) - 1 > MOST else []
    first = "all models" if isinstance(patch, Activation) else scope
    return "\n".join([f"{first}: {lines[0]}", *lines[1 : 1 + MOST], *more])


def end(patches: Iterable[Patch]) -> list[str]:
    """Take patches back, the newest first; the labels of places that a foreign patch holds."""
    with ledger.lock:
        newest_first = list(patches)[::-1]
        if api._standing in newest_first:
            api._standing = None
        return undo_all(
            one.undo if isinstance(one, Activation) else one.release for one in newest_first
        )
