"""Times of calls, by events on an accelerator and by the clock on a CPU, in interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch

from benchmarks.measure.environment import synchronize

#: Written before each timed call on an accelerator, to leave nothing of the inputs in its cache; so
#: often that the host has queued the call before the device comes to it.
FLUSH_BYTES, FLUSHES = 256 * 2**20, 8
FEWEST, MOST = 3, 60


@dataclass(frozen=True)
class Task:
    """``prepare(round)`` gives, untimed, what the timed ``step`` takes."""

    prepare: Callable[[int], Any]
    step: Callable[[Any], Any]


def measure(
    tasks: dict[str, Task], device: str, seconds: float = 0.3, most: int = MOST
) -> dict[str, list[float] | str]:
    """Seconds of every round of every task, or the error that ended it.

    The tasks take turns, so that a drift of the clocks meets all alike, each in as many rounds as
    fit into ``seconds``, within 3 to ``most``. Every task has run before: nothing compiles here.
    """
    found: dict[str, list[float] | str] = {}
    rounds = {}
    for name, task in tasks.items():
        try:
            once = min(_read(_start(task, turn, device), device) for turn in range(2))
            rounds[name] = min(most, max(FEWEST, int(seconds / max(once, 1e-7))))
        except Exception as error:
            found[name] = reason(error)
    marks: dict[str, list[Any]] = {name: [] for name in rounds}
    for turn in range(max(rounds.values(), default=0)):
        names = [name for name in rounds if turn < rounds[name] and name not in found]
        shift = turn % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            try:
                marks[name].append(_start(tasks[name], turn + 1, device))
            except Exception as error:
                found[name] = reason(error)
    synchronize(device)
    for name, taken in marks.items():
        if name not in found:
            found[name] = [_read(mark, device) for mark in taken]
    return found


def _start(task: Task, turn: int, device: str) -> Any:
    """Run a task once; its time, which ``_read`` gives, may still be pending."""
    state = task.prepare(turn)
    if device == "cpu":
        begin = time.perf_counter()
        task.step(state)
        return time.perf_counter() - begin
    for _ in range(FLUSHES):
        _flush_buffer(device).zero_()
    backend = getattr(torch, device)
    begin, end = backend.Event(enable_timing=True), backend.Event(enable_timing=True)
    begin.record()
    task.step(state)
    end.record()
    return begin, end


def _read(mark: Any, device: str) -> float:
    if device == "cpu":
        return float(mark)
    begin, end = mark
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


@cache
def _flush_buffer(device: str) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def host_times(
    calls: dict[str, Callable[[], Any]],
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]],
    device: str,
    batches: int = 15,
    size: int = 50,
) -> dict[str, list[float] | str]:
    """Seconds of host time a call: batches of calls without waiting for the device, in turns.

    ``contexts`` are entered, untimed, around the batches of their calls. A batch is short enough
    for the device's queue. On a CPU it is the whole time of the call.
    """
    found: dict[str, list[float] | str] = {name: [] for name in calls}
    for _ in range(batches + 1):
        for name, call in calls.items():
            times = found[name]
            if isinstance(times, str):
                continue
            try:
                with contexts.get(name, nullcontext)(), torch.no_grad():
                    call()
                    synchronize(device)
                    begin = time.perf_counter()
                    for _ in range(size):
                        call()
                    times.append((time.perf_counter() - begin) / size)
            except Exception as error:
                found[name] = reason(error)
    return {name: times if isinstance(times, str) else times[1:] for name, times in found.items()}


def limits(device: str, dtype: torch.dtype, quick: bool = False) -> dict[str, Any]:
    """The ceilings of this run: copy bandwidth (read plus write) by size, and the matrix rate."""
    largest = _largest_copy(device, quick)
    copies = {size: _copy_rate(size, device) for size in (largest // 16, largest // 4, largest)}
    edge = 256 if quick else 1536 if device == "cpu" else 8192
    left, right = (torch.randn(edge, edge, dtype=dtype, device=device) for _ in range(2))
    product = Task(lambda turn: None, lambda _: left @ right)
    return {
        "copy_gbs": copies[largest],
        "copy_gbs_by_bytes": {str(size): rate for size, rate in copies.items()},
        "matmul_tflops": 2 * edge**3 / _median(product, device) / 1e12,
        "matmul_edge": edge,
    }


def copy_rate(device: str, quick: bool = False) -> float:
    """GB/s of a copy so large that it does not fit into a cache, read plus write."""
    rate = _copy_rate(_largest_copy(device, quick), device)
    _flush_buffer.cache_clear()  # or it would count as memory of what is measured next
    return rate


def _largest_copy(device: str, quick: bool) -> int:
    return 2**22 if quick else 2**26 if device == "cpu" else 2**30


def _copy_rate(size: int, device: str) -> float:
    """GB/s of a copy of ``size`` bytes."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median(Task(lambda turn: None, lambda _: target.copy_(source)), device) / 1e9


def _median(task: Task, device: str) -> float:
    task.step(task.prepare(0))
    times = measure({"": task}, device)[""]
    if isinstance(times, str):
        raise RuntimeError(times)
    return median(times)


def reason(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:200]
