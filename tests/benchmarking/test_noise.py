"""Whether a difference is noise: the interval of the sign test."""

from __future__ import annotations

import random
from math import comb

import pytest

from hf_kernel_patch.benchmarking.noise import (
    CERTAINTY,
    FEWEST_ROUNDS,
    Difference,
    difference,
    spread,
)


def test_the_quartiles_are_those_of_the_rounds() -> None:
    found = spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert spread([7.0]) == spread([7.0, 7.0])


@pytest.mark.parametrize("rounds", range(FEWEST_ROUNDS, 40))
def test_the_interval_is_as_certain_as_is_said_and_no_wider(rounds: int) -> None:
    values = [float(one) for one in range(rounds)]
    found = difference(values, [0.0] * rounds)
    assert found.low is not None and found.high == rounds - 1 - found.low
    left_out = int(found.low)

    def certainty(outside: int) -> float:
        return 1 - 2 * sum(comb(rounds, k) for k in range(outside + 1)) / 2**rounds

    assert certainty(left_out) >= CERTAINTY > certainty(left_out + 1)


def test_few_rounds_tell_nothing() -> None:
    for rounds in range(1, FEWEST_ROUNDS):
        found = difference([2.0] * rounds, [1.0] * rounds)
        assert found == Difference(1.0) and not found.beyond_noise
    assert difference([2.0] * FEWEST_ROUNDS, [1.0] * FEWEST_ROUNDS).beyond_noise


def test_what_drifts_alike_is_taken_out_by_pairs() -> None:
    drift = [10.0 + 5 * number for number in range(12)]
    faster = [one - 0.1 for one in drift]
    found = difference(drift, faster)
    assert found.median == pytest.approx(0.1) and found.beyond_noise
    assert spread(drift).low < spread(faster).median < spread(drift).high


def test_one_outlier_of_twelve_decides_nothing() -> None:
    eager = [1.0] * 12
    faster = [0.9] * 11 + [50.0]
    assert difference(eager, faster).beyond_noise
    assert not difference(eager, [0.9] * 10 + [50.0] * 2).beyond_noise
    assert not difference(eager, eager).beyond_noise
    slower = difference(eager, [1.1] * 12)
    assert slower.beyond_noise and slower.median < 0


def test_noise_alone_is_rarely_taken_for_a_gain() -> None:
    draw = random.Random(0)
    wrong = sum(
        difference(*([draw.lognormvariate(0, 1) for _ in range(12)] for _ in range(2))).beyond_noise
        for _ in range(2000)
    )
    assert wrong < 2000 * (1 - CERTAINTY)
