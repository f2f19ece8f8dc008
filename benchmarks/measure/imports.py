"""Import time: this package against an empty Python, and against what it must not import."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure.environment import unpatched_environment

PACKAGE = "hf_kernel_patch"
#: Packages that importing ours must leave alone.
HEAVY = ("torch", "transformers", "triton")
_TIMED = (
    "import sys, time; begin = time.perf_counter(); {statement}; end = time.perf_counter();"
    f" print(end - begin, *[name for name in {HEAVY!r} if name in sys.modules])"
)


def measure(rounds: int = 15) -> dict[str, Any]:
    """Medians of interleaved runs: whole processes, and the import statement inside of one.

    The bytecode is there, as it is after an installation and a first run.
    """
    statements = "pass", f"import {PACKAGE}"
    whole: dict[str, list[float]] = {statement: [] for statement in statements}
    inside: list[float] = []
    heavy: list[str] = []
    with TemporaryDirectory() as folder:
        run = _runner(folder)
        run("-c", statements[1])
        for _ in range(rounds):
            for statement in statements:
                begin = time.perf_counter()
                done = run("-c", _TIMED.format(statement=statement))
                whole[statement].append(time.perf_counter() - begin)
            seconds, *heavy = done.stdout.split()
            inside.append(float(seconds))
        lines = run("-X", "importtime", "-c", statements[1]).stderr
    empty, ours = (1e3 * median(whole[statement]) for statement in statements)
    return {
        "process_ms": dict(zip(statements, (empty, ours), strict=True)),
        "more_ms": ours - empty,
        "statement_ms": 1e3 * median(inside),
        "heavy": heavy,
        "rounds": rounds,
        "slowest": slowest(lines),
    }


def slowest(lines: str, count: int = 8) -> list[dict[str, Any]]:
    """The modules that take longest themselves, from what ``-X importtime`` printed."""
    rows = [
        {"module": name.strip(), "self_us": int(own), "cumulative_us": int(total)}
        for own, total, name in re.findall(r"import time:\s+(\d+) \|\s+(\d+) \| (.+)", lines)
    ]
    # What comes before site is loaded by an empty Python too.
    start = next(place for place, row in enumerate(rows) if row["module"] == "site") + 1
    return sorted(rows[start:], key=lambda row: -row["self_us"])[:count]


def _runner(folder: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python with its bytecode in a folder."""
    environment = unpatched_environment() | {"PYTHONPYCACHEPREFIX": folder}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    return run
