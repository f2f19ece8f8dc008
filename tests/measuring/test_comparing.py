"""Whether one kind of step is faster than another, from given times."""

from __future__ import annotations

import math

import pytest

from hf_kernel_patch.measuring.comparing import Sample, compared, outside, ratios


def samples(seconds: list[float], sizes: list[int] | None = None, first: int = 0) -> list[Sample]:
    sizes = sizes or [10] * len(seconds)
    return [
        Sample(first + 2 * number, time, size)
        for number, (time, size) in enumerate(zip(seconds, sizes, strict=True))
    ]


def test_each_step_is_compared_with_the_nearest_of_the_others() -> None:
    # A machine that becomes slower and slower: only neighbours tell the truth.
    ours, theirs = samples([2.0, 4.0, 8.0], first=1), samples([1.0, 2.0, 4.0])
    assert ratios(ours, theirs) == [2.0, 2.0, 2.0]


def test_times_count_for_each_token() -> None:
    assert ratios(samples([1.2], [12]), samples([1.0], [10])) == pytest.approx([1.0])


def test_steps_of_other_sizes_are_only_compared_among_their_kind() -> None:
    theirs = samples([1.0, 50.0], [10, 100])
    assert ratios(samples([2.0, 100.0, 9.0], [10, 100, 33]), theirs) == [2.0, 2.0]
    assert ratios(samples([1.0], [0]), samples([1.0], [0])) == []


@pytest.mark.parametrize(("count", "left_out"), [(4, None), (5, 0), (7, 0), (8, 1), (16, 4)])
def test_an_interval_misses_the_median_seldom(count: int, left_out: int | None) -> None:
    assert outside(count) == left_out
    if left_out is not None:
        beyond = sum(math.comb(count, number) for number in range(left_out + 1))
        assert beyond / 2**count <= 0.04


def test_one_step_that_takes_very_long_changes_little() -> None:
    found = compared([1.0] * 7 + [100.0])
    assert found is not None
    assert (found.ratio, found.low, found.high, found.steps) == (1.0, 1.0, 1.0, 8)


def test_too_few_steps_say_nothing() -> None:
    assert compared([2.0] * 4) is None
