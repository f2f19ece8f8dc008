"""A simulated Ascend device: the unmodified torch_npu over host memory. See README.md.

Imports neither torch nor torch_npu before ``start``.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from .counter import calls, reset_calls

__all__ = ["VARIABLE", "available", "calls", "requested", "reset_calls", "start"]

#: Set to 1, the tests in tests/npu run on the simulated device.
VARIABLE = "NPUSIM"
#: The torch and torch_npu whose operators the references follow.
VERSION = "2.13.0"


def requested() -> bool:
    return os.environ.get(VARIABLE) == "1"


def available() -> str | None:
    """Why the simulator cannot run here, or None."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"npusim needs {tool}"
    if find_spec("torch_npu") is None:
        return "npusim needs the package torch_npu"
    try:
        found = {name: version(name).partition("+")[0] for name in ("torch", "torch_npu")}
    except PackageNotFoundError as error:
        return f"npusim needs the package {error}"
    if set(found.values()) != {VERSION}:
        return f"npusim needs torch and torch_npu {VERSION}; here: {found}"
    return None if _built_for_the_cpu() else "npusim needs a build of torch for the CPU alone"


def _built_for_the_cpu() -> bool:
    """torch_npu refuses to be imported beside another accelerator. Read without importing torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    written = Path(spec.origin).with_name("version.py").read_text()
    return re.search(r"^cuda\b.*= None$", written, re.MULTILINE) is not None


def start() -> None:
    """Makes ``npu`` a device of this process. Before anything has imported torch_npu."""
    if "torch_npu" in sys.modules:
        raise RuntimeError("npusim: torch_npu is already imported")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # a child process has no preloaded runtime
    os.environ["TASK_QUEUE_ENABLE"] = "0"  # operators run where they are called
    from . import build

    build.preload()
    import torch_npu  # noqa: F401

    from .install import install

    install()
