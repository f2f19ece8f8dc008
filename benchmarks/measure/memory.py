"""Peaks of device memory, also of a part of a call."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def reset_peak(device: str) -> None:
    """Begin anew; on a CPU there is nothing to begin."""
    if device != "cpu":
        getattr(torch, device).reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """Of device memory; of the whole process on a CPU."""
    if device != "cpu":
        return float(getattr(torch, device).max_memory_allocated()) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@contextmanager
def after_first_call(model: Any, tell: Callable[[], None]) -> Iterator[None]:
    """Within the block, ``tell`` once after the model's first call has returned.

    By a profile function, which is slow but changes nothing of the model: with a hook or a wrapper
    on it a patch may serve it by another path.
    """
    returned = False

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal returned
        if returned and event == "call":  # the frames of the model's call are gone
            sys.setprofile(before)
            tell()
        elif event == "return" and frame.f_code is code and frame.f_locals.get("self") is model:
            returned = True

    before, code = sys.getprofile(), torch.nn.Module._call_impl.__code__
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)
