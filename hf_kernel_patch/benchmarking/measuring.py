"""Seconds and peak memory of variants that take turns."""

from __future__ import annotations

import gc
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from hf_kernel_patch.benchmarking import memory
from hf_kernel_patch.benchmarking.workloads import Workload
from hf_kernel_patch.errors import cut
from hf_kernel_patch.ops._shared.collection import no_collection

#: Seconds that the timed calls of a turn take together at least, and how many they are at most.
SHORTEST, MOST_CALLS = 0.05, 10
OUT_OF_MEMORY = "out of memory"

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One turn: seconds of a call, and the bytes at its peak; None where they cannot be known."""

    seconds: float
    peak: int | None


#: A turn of a variant: given names of workloads, what came of each, or why nothing did.
Turn = Callable[[Sequence[str]], Mapping[str, Sample | str]]


class Told(Protocol):
    """What is told how far things are."""

    def begin(self, title: str, steps: int | None = None) -> None:
        """A part begins, of so many steps."""

    def step(self, done: int, text: str = "") -> None:
        """So many steps are done."""


@dataclass
class Samples:
    """What the rounds gave, by (variant, workload).

    Attributes:
        found: a sample for each round that is whole.
        failed: why there is none.
    """

    found: dict[tuple[str, str], list[Sample]] = field(default_factory=lambda: defaultdict(list))
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    rounds: int = 0


class Clock:
    """Measures single calls on one or several devices.

    Args:
        devices: that have to be waited for, and whose memory counts.
        now: gives seconds.
    """

    def __init__(self, devices: Iterable[str], now: Callable[[], float] = time.perf_counter):
        self._devices, self._now = tuple(devices), now
        self._resets = all(memory.resets(device) for device in self._devices)
        #: Workload -> how often a turn calls it.
        self.calls: dict[str, int] = {}

    def turn(self, workload: Workload, called: Any) -> Sample | str:
        """One call whose memory is measured, then timed ones; or why they failed.

        The first also does what a patch does at its first call, which is not timed.
        """

        def both() -> Sample:
            peak = self._peak(workload, called)
            count = self.calls.get(workload.name, 1)
            return Sample(sum(self._seconds(workload, called) for _ in range(count)) / count, peak)

        sample, reason = self._tried(both, workload)
        return reason if sample is None else sample

    def once(self, workload: Workload, called: Any) -> str:
        """A call that is not timed; why it failed, or ""."""
        return self._tried(lambda: self._peak(workload, called), workload)[1]

    def settle(self, workload: Workload, called: Any) -> str:
        """A first call and a timed one, by which it is known how often to call; why it failed."""
        found = self.turn(workload, called)
        if isinstance(found, str):
            return found
        count = math.ceil(SHORTEST / max(found.seconds, SHORTEST / MOST_CALLS))
        self.calls[workload.name] = count
        return ""

    def _tried(self, function: Callable[[], T], workload: Workload) -> tuple[T | None, str]:
        """What a function gives, or None and why it failed."""
        try:
            return function(), ""
        except Exception as error:
            reason = why(error)
        finally:
            workload.tidy()
        for device in self._devices:  # here, where the error holds nothing any more
            memory.give_back(device)
        return None, reason

    def _peak(self, workload: Workload, called: Any) -> int | None:
        workload.tidy()
        workload.prepare()
        gc.collect()
        for device in self._devices:
            if device == "cpu":  # where what was freed would be taken again, and not be seen
                memory.trim()
        self._wait()
        before = sum(memory.reset(device) for device in self._devices)
        workload.call(called)
        self._wait()
        after = sum(memory.peak(device) for device in self._devices)
        return after - before if self._resets else None

    def _seconds(self, workload: Workload, called: Any) -> float:
        workload.tidy()
        workload.prepare()
        with no_collection():
            self._wait()
            begin = self._now()
            workload.call(called)
            self._wait()
            return self._now() - begin

    def _wait(self) -> None:
        for device in self._devices:
            memory.synchronize(device)


def in_turns(
    variants: Mapping[str, tuple[Turn, Sequence[str]]],
    rounds: int,
    seed: int,
    told: Told,
    samples: Samples,
) -> None:
    """Rounds in which every variant has its turn, in another order each time.

    Args:
        variants: name -> its turn, and the workloads that it is measured with.
        rounds: how many.
        seed: of the orders.
        told: is told of every round.
        samples: gets what a round gave once the round is whole, so that all have equally many.
    """
    orders = random.Random(seed)
    names = [name for name, (_, workloads) in variants.items() if workloads]
    told.begin("measuring", rounds * len(names))
    for number in range(rounds):
        orders.shuffle(names)
        fresh: dict[tuple[str, str], Sample] = {}
        for place, name in enumerate(names):
            told.step(number * len(names) + place, f"round {number + 1} of {rounds}, {name}")
            turn, workloads = variants[name]
            alive = [one for one in workloads if (name, one) not in samples.failed]
            for workload, found in turn(alive).items() if alive else ():
                if isinstance(found, str):
                    samples.failed[name, workload] = found
                    samples.found.pop((name, workload), None)
                else:
                    fresh[name, workload] = found
        for key, sample in fresh.items():
            samples.found[key].append(sample)
        samples.rounds = number + 1


@contextmanager
def quick_collection() -> Iterator[bool]:
    """Collecting garbage looks at what is made inside alone: of a large program that is little.

    Gives whether older objects are set aside here, for ``seen_again``.
    """
    mine = gc.get_freeze_count() == 0  # else somebody's own would be unfrozen
    gc.collect()
    if mine:
        gc.freeze()
    try:
        yield mine
    finally:
        if mine:
            gc.unfreeze()


@contextmanager
def seen_again(set_aside: bool) -> Iterator[None]:
    """What is set aside is seen: a patch asks which of all instances own a forward."""
    if not set_aside:
        yield
        return
    gc.collect()  # while that is quick: what is dead is not to be set aside
    gc.unfreeze()
    try:
        yield
    finally:
        gc.freeze()


def why(error: Exception) -> str:
    """Why a call failed, in one line."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {cut(text)}" if text else type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Of a device, or of the machine; torch has no class of its own for all of them."""
    import torch

    words = ("can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(one in str(error).lower() for one in words)
    )
