"""Runs the variants of a model, each in a worker process, and gathers their answers."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
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

    def measure(self) -> Answer:
        """Have it measure once more."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # answer() says how it ended
            self._process.stdin.write("\n")
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
    together: bool,
    rounds: int,
    limit: float,
    done: Callable[[str, Answer], None],
) -> None:
    """Measure every job ``rounds`` times and tell ``done`` what was found, or the error.

    ``together`` keeps all processes and measures them in turns, so that a drift meets all alike:
    for a CPU. An accelerator has memory for one at a time.
    """
    batches = [list(jobs)] if together else [[name] for name in jobs]
    for batch in batches:
        workers = {name: Worker(jobs[name], limit) for name in batch}
        found: dict[str, Answer] = {name: {"error": None, "seconds": []} for name in batch}
        for turn in range(-1, rounds):
            for name, worker in workers.items():
                if found[name]["error"] is None:
                    _take(found[name], worker.answer if turn < 0 else worker.measure)
        for name, worker in workers.items():
            worker.close()
            if found[name]["seconds"]:
                found[name]["median_s"] = median(found[name]["seconds"])
            done(name, found[name])


def _take(found: Answer, ask: Callable[[], Answer]) -> None:
    try:
        answer = ask()
    except RuntimeError as error:
        found["error"] = str(error)
        return
    seconds = answer.pop("seconds", [])
    found |= answer
    found["seconds"] = found["seconds"] + seconds
