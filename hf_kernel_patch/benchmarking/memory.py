"""The most memory in use at once since the last reset, of this process; waiting for a device.

A device is named by its type, "cuda" for the current one of several, or with its number, "cuda:1".
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any


def reset(device: str) -> int:
    """Start a new peak; returns the bytes that do not count as used.

    Of an accelerator that is none; on a CPU what the process takes by then, or the old peak where a
    system cannot forget it.
    """
    if _has_own(device):
        _module(device).reset_peak_memory_stats(*_number(device))
        return 0
    _forget()
    return peak(device)


def in_use(device: str) -> int:
    """Bytes of now; on a CPU of right after ``reset``."""
    if not _has_own(device):
        return peak(device)
    return int(_module(device).memory_allocated(*_number(device)))


def resets(device: str) -> bool:
    """Whether an older, higher peak can be forgotten here."""
    return _has_own(device) or _forget()


def give_back(device: str) -> None:
    """Let other processes have what this one's allocator keeps for later."""
    gc.collect()
    if _has_own(device):
        _module(device).empty_cache()
    else:
        trim()


def trim() -> None:
    """Have the machine's own allocator, where it is glibc's, keep nothing for later."""
    if sys.platform == "linux":
        found = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if found is not None:
            found(0)


def peak(device: str) -> int:
    """Bytes: of the accelerator's allocator, on a CPU of resident memory."""
    if _has_own(device):
        return int(_module(device).max_memory_allocated(*_number(device)))
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


def synchronize(device: str) -> None:
    """Wait until the device has done all it was given."""
    _module(device).synchronize(*_number(device) if _has_own(device) else ())


def _has_own(device: str) -> bool:
    return _type(device) in ("cuda", "npu")


def _forget() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _module(device: str) -> Any:
    import torch

    return getattr(torch, _type(device))


def _type(device: str) -> str:
    return device.partition(":")[0]


def _number(device: str) -> tuple[int, ...]:
    """What the functions of ``torch.cuda`` and the like take for one of several."""
    number = device.partition(":")[2]
    return (int(number),) if number else ()
