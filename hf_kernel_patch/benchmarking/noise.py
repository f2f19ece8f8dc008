"""Whether a difference between two variants is more than noise.

Both have taken turns, so there is a pair of values for each round. The median difference lies, with
a certainty that depends on nothing but the number of rounds, between the k-th smallest and the k-th
largest of the differences: the interval of the sign test. It assumes neither a normal distribution
nor equal variances, and one slow round does not move it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

#: How certain the interval is at least. Some dozens of differences are judged at once, of which 95%
#: would get one or two wrong.
CERTAINTY = 0.99
#: With fewer rounds no interval is that certain.
FEWEST_ROUNDS = 8


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles: half of the values lie between ``low`` and ``high``."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much less the other variant takes than the first, round by round.

    Attributes:
        median: of the differences; below zero where the other one takes more.
        low: where the interval begins within which the true median lies, with 99% certainty; None
            where the rounds are too few to say.
        high: where it ends.
    """

    median: float
    low: float | None = None
    high: float | None = None

    @property
    def beyond_noise(self) -> bool:
        """Whether there is a difference at all: zero lies outside of the interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def difference(first: Sequence[float], other: Sequence[float]) -> Difference:
    """Of two variants that have taken turns, a value for each round."""
    found = sorted(a - b for a, b in zip(first, other, strict=True))
    median = statistics.median(found)
    if len(found) < FEWEST_ROUNDS:
        return Difference(median)
    left_out = _left_out(len(found))
    return Difference(median, found[left_out], found[-1 - left_out])


def _left_out(rounds: int) -> int:
    """How many of the smallest and of the largest differences lie outside of the interval."""
    outside, below = 0, 0.0
    while True:
        below += comb(rounds, outside) / 2**rounds
        if 1 - 2 * below < CERTAINTY:
            return outside - 1
        outside += 1
