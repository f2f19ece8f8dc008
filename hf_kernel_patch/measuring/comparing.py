"""Whether steps of one kind are faster than those of another, from their times alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import comb
from statistics import median
from typing import Any

#: Steps of different sizes are compared, by their time for each token, as far as they differ by
#: no more than this factor.
SAME_SIZE = 1.3
#: With how little probability an interval lies wholly above, or wholly below, the true median.
DOUBT = 0.04


@dataclass(frozen=True)
class Sample:
    """One step: its place among all, how long it took and how many tokens it saw."""

    place: int
    seconds: float
    size: int


@dataclass(frozen=True)
class Comparison:
    """The time of one kind of step divided by that of another: the median and its interval."""

    ratio: float
    low: float
    high: float
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def ratios(ours: list[Sample], theirs: list[Sample]) -> list[float]:
    """Each of our steps in relation to the nearest of theirs that is about as large."""
    found = []
    for one in ours:
        alike = [other for other in theirs if _alike(one.size, other.size)]
        if alike:
            other = min(alike, key=lambda sample: abs(sample.place - one.place))
            found.append(one.seconds / one.size / (other.seconds / other.size))
    return found


def compared(found: list[float]) -> Comparison | None:
    """What ratios say together; None where they are too few to say anything.

    The interval goes between two of the ratios themselves, so it asks nothing of how times are
    distributed, and one step that took very long changes little.
    """
    left_out = outside(len(found))
    if left_out is None:
        return None
    ordered = sorted(found)
    return Comparison(median(ordered), ordered[left_out], ordered[-1 - left_out], len(ordered))


def outside(count: int) -> int | None:
    """How many of so many values lie outside of the interval of their median, at either end."""
    left_out, below = None, 0
    for number in range(count // 2):
        below += comb(count, number)
        if below > DOUBT * 2**count:
            break
        left_out = number
    return left_out


def _alike(one: int, other: int) -> bool:
    return 0 < max(one, other) <= SAME_SIZE * min(one, other)
