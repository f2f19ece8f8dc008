"""The most memory in use at once since the last reset, of this process."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def reset(device: str) -> int:
    """Start a new peak; returns the present one in bytes.

    Where a system cannot forget the old peak, what comes is the growth over that.
    """
    if device == "cuda" or device == "npu":
        _module(device).reset_peak_memory_stats()
        return 0
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> int:
    """Bytes: of the accelerator's allocator, on a CPU of resident memory."""
    if device == "cuda" or device == "npu":
        return int(_module(device).max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: that begins with the parent's peak.
        line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _module(device: str) -> Any:
    import torch

    return getattr(torch, device)
