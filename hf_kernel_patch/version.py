"""The version of this package, and of those that it works with."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

__version__ = "0.1.0"

#: The newest transformers that the tests run with.
NEWEST_TRANSFORMERS = "5.24.0"
#: What a report of a bug has to say.
PACKAGES = (
    "torch",
    "triton",
    "torch-npu",
    "transformers",
    "wrapt",
    "kernels",
    "liger-kernel",
    "peft",
    "accelerate",
)


@cache
def versions() -> dict[str, str | None]:
    """Package -> installed version, or None."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "hf-kernel-patch": __version__,
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def newer_than_tested() -> str:
    """That the installed transformers is newer than all that are tested, or ""."""
    from packaging.version import Version

    here = versions()["transformers"]
    if here is None or Version(here) <= Version(NEWEST_TRANSFORMERS):
        return ""
    return f"transformers {here} is newer than {NEWEST_TRANSFORMERS}, the newest that is tested"
