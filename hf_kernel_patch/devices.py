"""Which devices and packages are usable here, and why not. Imports torch only when asked."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

#: Backend name -> (the package it needs, device types it can serve).
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("torch", ("any",)),
    "triton": ("triton", ("cuda", "xpu")),
    "npu": ("torch_npu", ("npu",)),
}


@cache
def current() -> str:
    """The device type of the accelerator in use, such as "cuda" or "npu"; "cpu" without one."""
    if missing_package("torch") or _has_no_accelerator():
        return "cpu"
    import torch

    if missing_package("torch_npu") is None:
        importlib_error = _import_error("torch_npu")
        if importlib_error is None and torch.npu.is_available():
            return "npu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def _has_no_accelerator() -> bool:
    """Whether the files of torch alone say so: its import takes seconds.

    A build for CPUs finds no accelerator, unless a package brings another backend. One for CUDA
    finds none where the driver is not installed. Anything else needs torch itself.
    """
    if "torch" in sys.modules or sys.platform not in ("linux", "win32"):
        return False
    if entry_points(group="torch.backends") or missing_package("torch_npu") is None:
        return False
    spec = find_spec("torch")
    built: dict[str, object] = {}
    try:
        code = Path(str(spec and spec.origin)).with_name("version.py").read_text(encoding="utf-8")
        exec(code, built)
    except Exception:  # another layout than known: torch itself has to say
        return False
    if built.get("hip") or built.get("xpu") or "cuda" not in built:
        return False
    return built["cuda"] is None or not _has_cuda_driver()


def _has_cuda_driver() -> bool:
    import ctypes

    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def missing_package(name: str) -> str | None:
    """The package's name where it is not importable, else None."""
    try:
        return None if find_spec(name) is not None else name
    except (ImportError, ValueError):
        return name


def why_not(device: str) -> str | None:
    """Why a device type cannot be used in this process, or None; "any" and "cpu" always can."""
    if device in ("any", "cpu") or device == current():  # in this order: current() needs torch
        return None
    if missing_package("torch"):
        return "needs the package torch"
    if device == "npu" and missing_package("torch_npu"):
        return "no npu device: the package torch_npu is not installed"
    if device == "npu" and (why := _import_error("torch_npu")):
        return f"no npu device: torch_npu is not usable ({why})"
    return f"no {device} device: the accelerator in use here is {current()!r}"


def why_no_backend(backend: str) -> str | None:
    """Why a backend that this package knows cannot run here, or None."""
    package, served = BACKENDS.get(backend, ("torch", ("any",)))
    if missing_package(package):
        return f"needs the package {package}"
    reasons = [why_not(device) for device in served]
    return None if None in reasons else reasons[0]


def why_not_importable(package: str) -> str | None:
    """Why an import of the package fails, or None."""
    if missing_package(package):
        return "is not installed"
    why = _import_error(package)
    return f"cannot be imported: {why[:500]}" if why else None


@cache
def _import_error(package: str) -> str | None:
    """The error that importing an installed package ends in, or None."""
    try:
        __import__(package)
    except Exception as error:  # a broken backend package must not take the program down
        return f"{type(error).__name__}: {error}"
    return None
