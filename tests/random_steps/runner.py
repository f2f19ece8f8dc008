"""Running steps by their seeds, and finding fewer that fail alike."""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.random_steps import snapshot
from tests.random_steps import steps_faults as faults
from tests.random_steps import steps_foreign as foreign
from tests.random_steps import steps_models as models
from tests.random_steps import steps_patch as patching
from tests.random_steps.machine import Inapplicable, Machine, Options
from tests.random_steps.worlds import Violation

Step = Callable[[Machine, Random], str]
#: Every step, with how often it is taken.
STEPS: dict[Step, int] = {
    patching.patch: 8,
    patching.unpatch: 6,
    patching.enter: 8,
    patching.leave: 8,
    patching.apply_kernel: 8,
    patching.apply_default_kernels: 5,
    patching.unpatch_model: 7,
    patching.callback_begins: 3,
    patching.callback_ends: 3,
    patching.count: 2,
    patching.capture: 1,
    models.build: 6,
    models.delete: 3,
    models.copied: 4,
    models.copied_module: 3,
    models.share: 2,
    models.load: 2,
    models.mode: 3,
    models.checkpointing: 2,
    models.attention: 2,
    models.threads: 2,
    foreign.replace: 5,
    foreign.take_back: 6,
    foreign.reset: 2,
    foreign.hook: 3,
    foreign.unhook: 4,
    foreign.hook_of_all: 1,
    foreign.accelerate_hook: 3,
    foreign.remove_accelerate_hook: 4,
    foreign.own_forward: 3,
    foreign.no_own_forward: 2,
    faults.fault: 8,
    faults.import_anew: 1,
}
BY_NAME = {step.__name__: step for step in STEPS}
#: A step and the seed of all that it chooses.
Planned = tuple[str, int]
#: Steps between two thorough checks, and between two fresh starts.
THOROUGH, FRESH = 10, 120
#: Seconds that a run may take.
LONGEST = 900


@dataclass
class Run:
    """What a run came to."""

    violation: Violation | None = None
    log: list[str] = field(default_factory=list)
    done: int = 0
    #: Number of the step that it ended with.
    last: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    checks: int = 0
    kept: dict[str, int] = field(default_factory=dict)


def plan(seed: int, steps: int, options: Options) -> list[Planned]:
    """Names and seeds of steps."""
    random = Random(seed)
    chosen = {s.__name__: n for s, n in STEPS.items() if s.__name__ not in options.without}
    names = random.choices(list(chosen), list(chosen.values()), k=steps)
    return [(name, random.randrange(10**9)) for name in names]


def run(machine: Machine, planned: Sequence[Planned]) -> Run:
    """Take the steps from a fresh start, with the checks after each, up to the first violation."""
    result = Run()
    try:
        for number, (name, seed) in enumerate(planned):
            result.last = number
            one(machine, result, number, name, seed)
        result.log.append("all is taken back")
        machine.close()
    except Violation as violation:
        result.violation = violation
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-5:])
        result.violation = Violation(f"raised {type(error).__name__}", f"{error}\n{text}")
    result.compared, result.checks = machine.snapshot.compared, machine.checks
    result.kept = snapshot.kept()
    return result


def one(machine: Machine, result: Run, number: int, name: str, seed: int) -> None:
    """One step and its checks."""
    random = Random(seed)
    result.log.append(f"{name} (did not end)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            said = BY_NAME[name](machine, random)
            result.taken[name] += 1
        except Inapplicable:
            result.log.pop()
            return
        result.log[-1] = said
        machine.check(random, thorough=number % THOROUGH == 0)
    result.done += 1


def chunks(planned: Sequence[Planned]) -> list[Sequence[Planned]]:
    """Plans that each begin with nothing in force."""
    return [planned[start : start + FRESH] for start in range(0, len(planned), FRESH)]


def side_by_side(tasks: Iterable[Callable[[], Any]], workers: int) -> Iterator[Any]:
    """What tasks return, as they end, each from a forked child; None where the child died.

    So whatever a task breaks is not broken here.
    """
    waiting, running = iter(tasks), {}
    more = True
    while more or running:
        while more and len(running) < workers:
            task = next(waiting, None)
            if more := task is not None:
                child, pipe = forked(task)
                running[pipe] = child, []
        for pipe in select.select(list(running), [], [])[0] if running else ():
            child, parts = running[pipe]
            if part := os.read(pipe, 1 << 16):
                parts.append(part)
                continue
            os.close(pipe)
            os.waitpid(child, 0)
            del running[pipe]
            yield pickle.loads(b"".join(parts)) if parts else None


def forked(task: Callable[[], Any]) -> tuple[int, int]:
    """(the child that does the task, the pipe that tells what came of it)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(task()))
    finally:
        os._exit(0)


def apart(machine: Machine, planned: Sequence[Planned]) -> Run:
    """A run in a forked child, which tells where it stands and dies if it hangs."""

    def watched() -> Run:
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        return run(machine, planned)

    told = next(side_by_side([watched], 1))
    return told or Run(Violation("crash", "the process died"))


def shrink(
    machine: Machine, planned: Sequence[Planned], found: Run, seconds: float
) -> tuple[list[Planned], Run]:
    """Fewer steps with a violation of the same kind: halves are left out, then quarters ..."""
    assert found.violation is not None
    left, end = list(planned[: found.last + 1]), time.perf_counter() + seconds
    size = max(len(left) // 2, 1)
    while time.perf_counter() < end:
        place = 0
        while place < len(left) and time.perf_counter() < end:
            fewer = left[:place] + left[place + size :]
            again = apart(machine, fewer)
            if again.violation is not None and again.violation.kind == found.violation.kind:
                left, found = fewer[: again.last + 1], again
            else:
                place += size
        if size == 1:
            break
        size //= 2
    return left, found
