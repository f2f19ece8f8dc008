"""What looking for known code costs: in each module after its import, and in all files."""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
import time
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure.environment import unpatched_environment


def measure(limit: int | None = None) -> dict[str, Any]:
    """CPU seconds of discovery by module, and of ``list --models`` without and with its cache.

    ``limit`` is how many modules are looked at, all by default; then nothing is listed.
    """
    from hf_kernel_patch import models
    from hf_kernel_patch.recognition.discovery import discover

    names = [name for modules in models.families().values() for name in modules][:limit]
    spent: dict[str, float] = {}
    imported: dict[str, float] = {}
    for name in names:
        begin = time.process_time()
        try:
            module = importlib.import_module(name)
        except (ImportError, RuntimeError):  # it needs a package that is not here
            continue
        imported[name] = time.process_time() - begin
        begin = time.process_time()
        discover(vars(module), name)
        spent[name] = time.process_time() - begin
    slowest = sorted(spent, key=lambda name: -spent[name])[:5]
    return {
        "modules": len(names),
        "looked_at": len(spent),
        "median_ms": 1e3 * median(spent.values()),
        "largest_ms": 1e3 * max(spent.values()),
        "import_median_ms": 1e3 * median(imported.values()),
        "slowest": [{"module": name, "ms": 1e3 * spent[name]} for name in slowest],
        "list_s": [] if limit else _listed(),
    }


def _listed() -> list[dict[str, float]]:
    """Seconds of ``list --models``, cold and then warm."""
    command = [sys.executable, "-m", "hf_kernel_patch", "list", "--models"]
    found = []
    with TemporaryDirectory() as folder:
        environment = unpatched_environment() | {"HF_KERNEL_PATCH_CACHE": folder}
        for _ in range(2):
            before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            found.append({"wall": time.perf_counter() - begin, "cpu": cpu})
    return found
