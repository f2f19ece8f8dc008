"""Runs the variants of a model, each in a worker process, and gathers their answers."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from statistics import median
from typing import Any, TextIO

from benchmarks.measure.environment import unpatched_environment
from benchmarks.measure.worker import MARK

Answer = dict[str, Any]


class Worker:
    """A worker process: ``info`` after its warm-up, then ``measure`` at will."""

    def __init__(self, job: dict[str, Any], limit: float):
        self._errors: TextIO = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.measure.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=unpatched_environment(),
        )
        self._limit, self._late = limit, threading.Event()
        self._timer = threading.Timer(limit, self._stop)
        self._timer.daemon = True
        self._timer.start()

    def _stop(self) -> None:
        self._late.set()
        self._process.kill()

    def answer(self) -> Answer:
        """The next answer; raises RuntimeError with the worker's last words if it has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                found: Answer = json.loads(line.removeprefix(MARK))
                return found
        code = self._process.wait()
        if self._late.is_set():
            raise RuntimeError(f"over its limit of {self._limit:g} s")
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        raise RuntimeError(f"exit {code}: {lines[-1] if lines else 'no message'}"[:300])

    def ask(self, request: str, batch: int) -> Answer:
        """Have it prepare, measure or check a batch; raises RuntimeError as ``answer`` does."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # answer() says how it ended
            self._process.stdin.write(json.dumps([request, batch]) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End it and wait for that."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._timer.cancel()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def run(
    jobs: dict[str, dict[str, Any]],
    batches: Sequence[int],
    together: bool,
    rounds: int,
    limit: float,
    done: Callable[[str, int, Answer], None],
    checks: Mapping[str, Callable[[Answer], None]] | None = None,
) -> None:
    """Measure every job ``rounds`` times at every batch; ``done`` is told what was found.

    What was found has an error where there was one, which ends neither other batches nor other
    jobs. The jobs of ``checks`` check the first batch after all is measured, since that undoes the
    patch; the values are told what was found. ``together`` keeps all processes and measures them in
    turns, so that a drift meets all alike: for a CPU. An accelerator has memory for one at a time.
    """
    for names in [list(jobs)] if together else [[name] for name in jobs]:
        workers = {name: Worker(jobs[name], limit) for name in names}
        built = {name: _try(worker.answer) for name, worker in workers.items()}
        for batch in batches:
            taken = {name: [built[name]] for name in names}
            for turn in range(-1, rounds):
                for name, worker in workers.items():
                    if all(answer.get("error") is None for answer in taken[name]):
                        request = "prepare" if turn < 0 else "measure"
                        taken[name].append(_try(partial(worker.ask, request, batch)))
            for name in names:
                done(name, batch, joined(taken[name]))
        for name, worker in workers.items():
            if checks and name in checks:
                checks[name](_try(partial(worker.ask, "check", batches[0])))
            worker.close()


def _try(ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except RuntimeError as error:
        return {"error": str(error)}


def joined(answers: Sequence[Answer]) -> Answer:
    """One answer of several: the medians of their times, and all "seconds" in one list."""
    found: Answer = {"error": None, "seconds": []}
    for answer in answers:
        found |= {key: value for key, value in answer.items() if key != "seconds"}
        found["seconds"] = found["seconds"] + answer.get("seconds", [])
    for key in found:
        if key.endswith("_s"):
            found[key] = median(answer[key] for answer in answers if key in answer)
    if found["seconds"]:
        found["median_s"] = median(found["seconds"])
    return found
