"""Turns: their order, what a failure does, and what is timed of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hf_kernel_patch.benchmarking import memory
from hf_kernel_patch.benchmarking.measuring import Clock, Sample, Samples, in_turns, why
from hf_kernel_patch.benchmarking.public import Lines
from hf_kernel_patch.benchmarking.workloads import Workload


class Silent:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def begin(self, title: str, steps: int | None = None) -> None:
        self.texts.append(f"{title}, {steps} steps")

    def step(self, done: int, text: str = "") -> None:
        self.texts.append(f"{done}: {text}")


def turns_of(calls: list[str], **failing: int) -> dict[str, Any]:
    """Turns of four variants that tell when they are; some fail from their nth turn on."""

    def make(name: str) -> Any:
        def turn(workloads: Sequence[str]) -> dict[str, Sample | str]:
            calls.append(name)
            if name in failing and calls.count(name) >= failing[name]:
                return dict.fromkeys(workloads, "it failed")
            return {one: Sample(float(calls.count(name)), 7) for one in workloads}

        return turn

    return {name: (make(name), ["training", "decoding"]) for name in "abcd"}


def test_every_round_has_a_turn_of_each_variant_in_another_order() -> None:
    calls: list[str] = []
    samples, told = Samples(), Silent()
    in_turns(turns_of(calls), 6, 0, told, samples)
    orders = [tuple(calls[start : start + 4]) for start in range(0, 24, 4)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 3
    assert samples.rounds == 6
    assert all([one.seconds for one in found] == [*range(1, 7)] for found in samples.found.values())
    assert len(samples.found) == 8
    again: list[str] = []
    in_turns(turns_of(again), 6, 0, Silent(), Samples())
    assert again == calls
    other: list[str] = []
    in_turns(turns_of(other), 6, 1, Silent(), Samples())
    assert other != calls
    assert told.texts[0] == "measuring, 24 steps"
    assert told.texts[-1] == f"23: round 6 of 6, {calls[-1]}"


def test_a_variant_that_fails_has_no_more_turns_and_the_others_go_on() -> None:
    calls: list[str] = []
    samples = Samples()
    in_turns(turns_of(calls, b=3), 5, 0, Silent(), samples)
    assert Counter(calls) == {"a": 5, "b": 3, "c": 5, "d": 5}
    assert samples.failed == {("b", "training"): "it failed", ("b", "decoding"): "it failed"}
    assert {name for name, _ in samples.found} == {"a", "c", "d"}


def test_a_round_that_is_broken_off_counts_for_nobody() -> None:
    calls: list[str] = []
    turns = turns_of(calls)
    turn, names = turns["c"]

    def interrupted(workloads: Sequence[str]) -> Any:
        if calls.count("c") == 2:
            raise KeyboardInterrupt
        return turn(workloads)

    turns["c"] = (interrupted, names)
    samples = Samples()
    with pytest.raises(KeyboardInterrupt):
        in_turns(turns, 5, 0, Silent(), samples)
    assert samples.rounds == 2
    assert {len(found) for found in samples.found.values()} == {2}


class Ticking:
    """A clock of its own, which goes on by what is done."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def workload(clock: Ticking, seconds: float, done: list[str]) -> Workload:
    def call(called: str) -> None:
        done.append(called)
        clock.time += seconds

    return Workload(
        "training", 8, lambda: done.append("prepare"), call, lambda: done.append("tidy")
    )


def test_the_first_call_of_a_turn_is_not_timed_and_short_ones_are_repeated() -> None:
    now, done = Ticking(), list[str]()
    clock = Clock(["cpu"], now)
    quick = workload(now, 0.02, done)
    assert clock.settle(quick, "model") == ""
    assert done == [*["tidy", "prepare", "model"] * 2, "tidy"]
    assert clock.calls == {"training": 3}
    found = clock.turn(quick, "model")
    assert isinstance(found, Sample) and found.seconds == pytest.approx(0.02)
    assert done.count("model") == 2 + 1 + 3
    for seconds, calls in ((0.0, 10), (1e-9, 10), (0.05, 1), (3.0, 1)):
        clock.settle(workload(now, seconds, done), "model")
        assert clock.calls["training"] == calls


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (MemoryError(), "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory",
        ),
        (RuntimeError("CUDA error: out of memory"), "out of memory"),
        (ValueError("no\nsuch thing"), "ValueError: no such thing"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_what_fails_is_tidied_up_and_told_in_a_line(error: Exception, words: str) -> None:
    done: list[str] = []

    def fail(called: Any) -> None:
        raise error

    failing = Workload("training", 8, lambda: None, fail, lambda: done.append("tidy"))
    clock = Clock(["cpu"])
    assert clock.turn(failing, None) == words == why(error) == clock.once(failing, None)
    assert done == ["tidy"] * 4


def test_the_peak_is_that_of_a_call() -> None:
    if not memory.resets("cpu"):
        pytest.skip("this system keeps the peak of the whole process")

    def call(called: Any) -> None:
        torch.ones(2**24)  # 64 MiB

    found = Clock(["cpu"]).turn(Workload("training", 8, lambda: None, call, lambda: None), None)
    assert isinstance(found, Sample) and found.peak is not None
    assert 60 < found.peak / 2**20 < 90


def test_lines_are_few() -> None:
    said: list[str] = []
    lines = Lines(said.append)
    lines.begin("trying training")
    lines.begin("measuring", 500)
    for done in range(500):
        lines.step(done, "round")
    assert said[:2] == ["trying training", "measuring: 0 of 500, round"]
    assert len(said) == 11
