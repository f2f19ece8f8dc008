"""What a result has to say about where it was measured."""

from __future__ import annotations

import os
import platform
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

#: Distributions whose versions go into every result.
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "scattermoe",
    "hf_kernel_patch",
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_device() -> str:
    """The accelerator's type, or "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else "cpu"


def default_dtype(device: str) -> str:
    """bf16 on an accelerator; fp32 on a CPU, where few have units for bf16."""
    return "fp32" if device == "cpu" else "bf16"


def header(kind: str, device: str, dtype: str) -> dict[str, Any]:
    """The fields that every result begins with."""
    return {
        "kind": kind,
        "device": describe(device),
        "dtype": dtype,
        "versions": versions(),
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(device: str) -> dict[str, Any]:
    """Type, name and memory or threads of a device."""
    if device == "cpu":
        return {"type": "cpu", "name": _processor(), "threads": torch.get_num_threads()}
    properties = getattr(torch, device).get_device_properties(0)
    gib = properties.total_memory / 2**30
    return {"type": device, "name": properties.name, "memory_gib": round(gib, 1)}


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command line, as one would type it."""
    return " ".join(["python -m benchmarks", *sys.argv[1:]])


def slug(text: str) -> str:
    """A name for files: lower case, with hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def synchronize(device: str) -> None:
    """Wait for the device's queue."""
    if device != "cpu":
        getattr(torch, device).synchronize()


def unpatched_environment() -> dict[str, str]:
    """The environment without the variables that would patch a process at import."""
    return {k: v for k, v in os.environ.items() if not k.startswith("HF_KERNEL_PATCH")}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        return found[1].strip()
    return platform.processor() or platform.machine()
