"""Which ops serve which step, and what is kept, with given times."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest

from hf_kernel_patch.measuring.schedule import (
    NOT_COMPARED,
    NOTHING_CALLED,
    ROUNDS,
    WARM_UP,
    Ops,
    Schedule,
    Verdict,
    usual,
)

AUTO = ("norm", "rope")


def finished(
    schedule: Schedule,
    seconds: Callable[[Ops], float | None],
    size: Callable[[int], int] = lambda step: 100,
    called: tuple[str, ...] = (*AUTO, "mlp"),
) -> tuple[Verdict, list[Ops]]:
    """The verdict, and which ops served each step."""
    steps: list[Ops] = []
    while schedule.verdict is None:
        steps.append(schedule.ops)
        for op in called if schedule.warming_up else ():
            if op in schedule.ops:
                schedule.served(op)
        schedule.step(seconds(schedule.ops), size(len(steps)))
        assert len(steps) <= schedule.limit
    assert schedule.steps == len(steps)
    return schedule.verdict, steps


def costs(noise: float = 0.0, seed: int = 0, **each: float) -> Callable[[Ops], float]:
    """Seconds of a step: one, and what each op adds, with some noise."""
    chance = random.Random(seed)
    return lambda ops: (1 + sum(each.get(op, 0) for op in ops)) * chance.uniform(1, 1 + noise)


def test_what_pays_stays_and_what_does_not_goes() -> None:
    verdict, steps = finished(Schedule(AUTO, ["mlp"]), costs(norm=-0.1, rope=0.05, mlp=-0.05))
    assert verdict.ops == {"norm", "mlp"}
    assert verdict.findings["norm"].ratio < 1 < verdict.findings["rope"].ratio
    assert verdict.whole is not None and verdict.whole.ratio == pytest.approx(0.85)
    assert not verdict.note
    assert len(steps) == usual(2, 1)


def test_steps_come_in_turns_and_each_round_begins_with_another() -> None:
    _, steps = finished(Schedule(AUTO), costs(norm=-0.1))
    rounds = steps[WARM_UP : WARM_UP + 3 * (1 + ROUNDS)]
    every = {frozenset(AUTO), frozenset({"norm"}), frozenset({"rope"})}
    groups = [rounds[start : start + 3] for start in range(0, len(rounds), 3)]
    assert all(set(group) == every for group in groups)
    assert {group[0] for group in groups} == every


@pytest.mark.parametrize("seed", range(20))
def test_noise_decides_nothing(seed: int) -> None:
    verdict, _ = finished(Schedule(AUTO), costs(noise=0.02, seed=seed, norm=-0.2, rope=-0.2))
    assert verdict.ops == set(AUTO)


@pytest.mark.parametrize("seed", range(10))
def test_what_makes_no_difference_is_as_auto_has_it(seed: int) -> None:
    schedule = Schedule(AUTO, ["mlp"])
    verdict, _ = finished(schedule, costs(noise=0.005, seed=seed))
    assert verdict.ops in (set(AUTO), set())  # the latter if all seems slower than nothing
    if not verdict.ops:
        assert verdict.whole is not None and verdict.whole.low > 1


def test_an_extra_that_pays_in_the_place_of_a_slow_op_alone_is_out() -> None:
    def seconds(ops: Ops) -> float:  # the first serves in the place of "norm", half the times
        return 1 + 0.2 * ("norm" in ops) * (0.5 if "mlp" in ops else 1)

    verdict, _ = finished(Schedule(AUTO, ["mlp"]), seconds)
    assert verdict.ops == {"rope"}


@pytest.mark.parametrize("together", [False, True])
def test_with_everything_slow_nothing_stays(together: bool) -> None:
    each = costs(norm=0.05, rope=0.1, mlp=0.2)
    verdict, _ = finished(Schedule(AUTO, ["mlp"], together), each)
    assert verdict.ops == set()


def test_a_very_slow_op_is_out_after_a_few_steps() -> None:
    verdict, steps = finished(Schedule(AUTO), costs(norm=9.0, rope=0.05))
    assert verdict.ops == set()  # beside the slow one nobody could have seen the other
    assert sum("norm" in ops for ops in steps) <= WARM_UP + 2 * 4
    assert verdict.findings["norm"].ratio == pytest.approx(10.05 / 1.05)


def test_processes_that_step_together_take_as_many_steps_each() -> None:
    counts = {
        len(finished(Schedule(AUTO, together=True), costs(norm=cost, rope=-0.1))[1])
        for cost in (-0.1, 0.1, 9.0)
    }
    assert counts == {usual(2)}


def test_ops_that_seem_to_pay_alone_go_where_they_do_not_together() -> None:
    def seconds(ops: Ops) -> float:
        return {0: 1.0, 1: 1.5, 2: 1.2}[len(ops)]

    verdict, _ = finished(Schedule(AUTO), seconds)
    assert verdict.ops == set()
    assert verdict.note and verdict.whole is not None
    assert verdict.whole.ratio == pytest.approx(1.2)


def test_extras_that_pay_alone_only_leave_what_auto_has() -> None:
    times: Mapping[int, float] = {0: 1.0, 1: 0.9, 2: 0.8, 3: 0.95}

    def seconds(ops: Ops) -> float:
        return times[len(ops)]

    verdict, _ = finished(
        Schedule(["norm"], ["mlp", "loss"]), seconds, called=("norm", "mlp", "loss")
    )
    assert verdict.ops == {"norm"}
    assert verdict.whole is not None and verdict.whole.ratio == pytest.approx(0.9)


def test_ops_that_serve_nothing_are_not_asked_about() -> None:
    verdict, steps = finished(Schedule(AUTO, ["mlp"]), costs(norm=-0.1), called=("norm",))
    assert verdict.findings.keys() == {"norm"}
    assert len(steps) == usual(1) - 9  # what was chosen is what auto has: one kind less
    verdict, steps = finished(Schedule(AUTO), costs(), called=())
    assert verdict.ops == set(AUTO)
    assert (verdict.note, len(steps)) == (NOTHING_CALLED, WARM_UP)


def test_steps_of_all_sizes_are_compared_too() -> None:
    chance = random.Random(0)
    sizes = [chance.choice([64, 100, 130, 400]) for _ in range(1000)]
    each = costs(norm=-0.1, rope=0.1)
    step = iter(sizes)
    schedule = Schedule(AUTO)

    def size(number: int) -> int:
        return next(step)

    steps = 0
    while schedule.verdict is None:
        for op in schedule.ops:
            schedule.served(op)
        tokens = size(steps)
        schedule.step(each(schedule.ops) * tokens, tokens)
        steps += 1
    assert schedule.verdict.ops == {"norm"}
    assert usual(2) - 9 < steps <= schedule.limit


def test_steps_that_cannot_be_compared_come_once_more() -> None:
    calls = iter(range(10_000))

    def seconds(ops: Ops) -> float | None:
        return None if next(calls) % 2 else costs(norm=0.1, rope=-0.1)(ops)

    verdict, steps = finished(Schedule(AUTO), seconds)
    assert verdict.ops == {"rope"}
    assert len(steps) > 2 * usual(2) - 20


def test_where_nothing_can_be_compared_it_ends_as_auto() -> None:
    for together in (False, True):
        schedule = Schedule(AUTO, ["mlp"], together)
        verdict, _ = finished(schedule, lambda ops: None)
        assert verdict.ops == set(AUTO)
        assert verdict.note == NOT_COMPARED
        assert schedule.steps <= schedule.limit
