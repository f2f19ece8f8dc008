"""``python -m tests.random_steps --steps 20000 --workers 16``: random steps, what they break."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Where torch finds a device, its autograd has threads and does not run in a forked child.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

import torch

from tests.random_steps.machine import Machine, Options
from tests.random_steps.runner import FRESH, Planned, Run, apart, chunks, plan, shrink, side_by_side
from tests.random_steps.worlds import Violation

#: What is asked of the package: see ``Options``.
FLAGS = {one.name: one.default for one in dataclasses.fields(Options) if one.type == "bool"}


@dataclass
class Ended:
    """What became of one chunk."""

    number: int
    found: Run
    #: Its violation again, after fewer steps.
    fewer: Run | None = None


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.random_steps", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1, help="processes beside each other")
    parser.add_argument("--chunk", type=int, help="only this part of the steps, to replay it")
    parser.add_argument("--without", default="", help="steps to leave out, separated by commas")
    for flag, default in FLAGS.items():
        name = f"--{flag.replace('_', '-')}"
        parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default)
    parser.add_argument("--shrink", type=float, default=60, help="seconds to look for fewer steps")
    parser.add_argument("--keep-going", action="store_true", help="past a violation")
    return parser.parse_args()


def main() -> int:
    given = parsed()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    flags = {flag: getattr(given, flag) for flag in FLAGS}
    options = Options(without=frozenset(given.without.split(",")), **flags)
    machine, total, kinds = Machine(options), Run(), Counter[str]()
    start, stop = time.perf_counter(), False

    def tasks() -> Iterator[Callable[[], Ended]]:
        for number, planned in enumerate(chunks(plan(given.seed, given.steps, options))):
            if given.chunk in (None, number) and not stop:
                yield lambda n=number, p=planned: one_chunk(machine, n, p, given.shrink)

    for ended in side_by_side(tasks(), given.workers):
        ended = ended or Ended(-1, Run(Violation("crash", "the process of a chunk died")))
        for name in ("done", "taken", "compared", "checks"):
            setattr(total, name, getattr(total, name) + getattr(ended.found, name))
        spent = time.perf_counter() - start
        print(
            f"{total.done} steps, {total.done / spent:.1f} a second; {total.checks} results and "
            f"{total.compared:,} objects compared; kept {ended.found.kept}",
            flush=True,
        )
        if ended.found.violation is not None:
            kinds[ended.found.violation.kind] += 1
            told(f"VIOLATION in step {ended.number * FRESH + ended.found.last}", ended.found)
            print(f"replay: {replay(given, flags)} --chunk {ended.number}", flush=True)
            if ended.fewer is not None:
                told("The same in fewer steps", ended.fewer)
            stop = not given.keep_going
    print(f"steps taken: {dict(total.taken.most_common())}")
    print(
        f"seed {given.seed}: {total.done} steps, {total.checks} results compared, "
        f"{total.compared:,} objects compared, {kinds.total()} wrong {dict(kinds) or ''}"
        f"in {time.perf_counter() - start:.0f} s with {given.workers} workers"
    )
    return int(kinds.total() > 0)


def one_chunk(machine: Machine, number: int, planned: Sequence[Planned], seconds: float) -> Ended:
    """A chunk, and if it breaks something, fewer steps that do."""
    ended = Ended(number, apart(machine, planned))
    if ended.found.violation is not None and seconds:
        _, ended.fewer = shrink(machine, planned, ended.found, seconds)
    return ended


def replay(given: Any, flags: dict[str, bool]) -> str:
    """The command that takes the same steps."""
    words = ["python -m tests.random_steps", f"--seed {given.seed} --steps {given.steps}"]
    words += [f"--without {given.without}"] if given.without else []
    for flag, on in flags.items():
        if on != FLAGS[flag]:
            words.append(f"--{'' if on else 'no-'}{flag.replace('_', '-')}")
    return " ".join(words)


def told(title: str, found: Run) -> None:
    """The violation, and the last steps that led to it."""
    print(f"\n{title}:\n  " + "\n  ".join(found.log[-30:]) + f"\n  {found.violation}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
