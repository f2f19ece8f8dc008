"""What became of a call of a patched function."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class How(StrEnum):
    """How a call was answered; its value is how reports name it."""

    SERVED = "served"
    #: By graphs that were captured, instead of launching each kernel.
    REPLAYED = "served by CUDA graphs"
    #: Counted beside SERVED, for a call that graphs might have served.
    NOT_REPLAYED = "served without CUDA graphs"
    #: By the original code.
    FALLBACK = "fallback"


class CallOutcome(NamedTuple):
    """How a call was answered, and why not better; "" where nothing is better."""

    how: How
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.how}: {self.reason}" if self.reason else self.how


SERVED = CallOutcome(How.SERVED)
REPLAYED = CallOutcome(How.REPLAYED)


def fallback(reason: str) -> CallOutcome:
    """The original ran, for this reason."""
    return CallOutcome(How.FALLBACK, reason)
