"""Which devices and packages are usable here, and why not. Imports torch only when asked."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

#: Backend name -> (the package it needs, device types it can serve).
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("torch", ("any",)),
    "triton": ("triton", ("cuda", "xpu")),
    "npu": ("torch_npu", ("npu",)),
}


@cache
def current() -> str:
    """The device type of the accelerator in use, such as "cuda" or "npu"; "cpu" without one."""
    if missing_package("torch"):
        return "cpu"
    import torch

    if missing_package("torch_npu") is None:
        importlib_error = _import_error("torch_npu")
        if importlib_error is None and torch.npu.is_available():
            return "npu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


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


@cache
def _import_error(package: str) -> str | None:
    """The error that importing an installed package ends in, or None."""
    try:
        __import__(package)
    except Exception as error:  # a broken backend package must not take the program down
        return f"{type(error).__name__}: {error}"
    return None
