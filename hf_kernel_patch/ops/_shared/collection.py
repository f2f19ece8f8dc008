"""Python's collector of garbage: held off for a while, and asked who holds an object."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_collection() -> Iterator[None]:
    """Nothing is collected inside; afterwards it is as it was before."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def holders_of(*objects: object) -> list[Any]:
    """``gc.get_referrers``, also of those that somebody has set aside by ``gc.freeze()``.

    What was made since is set aside with them.
    """
    if not gc.get_freeze_count():
        return gc.get_referrers(*objects)
    gc.unfreeze()
    try:
        return gc.get_referrers(*objects)
    finally:
        gc.freeze()
