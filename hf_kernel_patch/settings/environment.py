"""The variables: nothing else in the package reads os.environ."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hf_kernel_patch.errors import cut, nearest, unknown
from hf_kernel_patch.settings.values import read_boolean

PREFIX = "HF_KERNEL_PATCH"
#: Every variable that is read; the last three are set by ``run --report`` and ``bisect``.
VARIABLES = (
    PREFIX,
    *(
        f"{PREFIX}_{name}"
        for name in (
            "EXCLUDE",
            "MODELS",
            "BACKEND",
            "OPTIONS",
            "STRICT",
            "COUNT",
            "CAPTURE",
            "LOG",
            "DISABLE",
            "CACHE",
            "REPORT",
            "REPORTER",
            "BISECTION",
        )
    ),
)


def disabled() -> bool:
    """Whether HF_KERNEL_PATCH_DISABLE switches everything off."""
    return flag("DISABLE")


def flag(name: str, default: bool = False) -> bool:
    """The truth of the variable HF_KERNEL_PATCH_<name>; ValueError where it cannot be read."""
    variable = f"{PREFIX}_{name}"
    value = os.environ.get(variable, "")
    return read_boolean(value, f"the variable {variable}") if value.strip() else default


def log_level() -> int | None:
    """The level that HF_KERNEL_PATCH_LOG names, or None where the program's logging decides."""
    variable = f"{PREFIX}_LOG"
    value = os.environ.get(variable, "").strip().lower()
    if value in ("", "0", "off", "false"):
        return None
    levels = {name.lower(): level for name, level in logging.getLevelNamesMapping().items()}
    if value not in levels:
        raise unknown("level", value, {"off", "debug", "info", "warning", "error"}, variable)
    return levels[value]


def child_environment(directory: str, options: Mapping[str, str]) -> dict[str, str]:
    """A copy of the environment for a child that is to be patched.

    Args:
        directory: goes first on PYTHONPATH.
        options: values for the variables, by the arguments' names ("include", "models", ...).
            HF_KERNEL_PATCH is "auto" where neither they nor the environment say anything.
    """
    child = dict(os.environ)
    if "report" in options:  # what has reported before was to another file
        child.pop(f"{PREFIX}_REPORTER", None)
    path = [entry for entry in child.get("PYTHONPATH", "").split(os.pathsep) if entry]
    child["PYTHONPATH"] = os.pathsep.join([directory, *(e for e in path if e != directory)])
    if not child.get(PREFIX, "").strip():
        child[PREFIX] = "auto"
    return {**child, **{variable_of(name): value for name, value in options.items()}}


@contextmanager
def variables_unset() -> Iterator[None]:
    """No HF_KERNEL_PATCH variable in the environment, for children that are started within."""
    kept = {name: os.environ.pop(name) for name in given_variables()}
    try:
        yield
    finally:
        os.environ.update(kept)


def given_variables() -> list[str]:
    """The HF_KERNEL_PATCH variables of the environment that are not empty."""
    return sorted(n for n, value in os.environ.items() if n.startswith(PREFIX) and value.strip())


def bisected_environment(directory: str, options: Mapping[str, str], folder: str) -> dict[str, str]:
    """As ``child_environment``, for a run of ``hf-kernel-patch bisect``."""
    return {**child_environment(directory, options), f"{PREFIX}_BISECTION": folder}


def unpatched_environment() -> dict[str, str]:
    """A copy of the environment for a child in which nothing is patched."""
    return {**os.environ, f"{PREFIX}_DISABLE": "1"}


def bisection() -> Path | None:
    """The folder in which ``hf-kernel-patch bisect`` and the program that it runs meet, if any."""
    given = os.environ.get(f"{PREFIX}_BISECTION", "").strip()
    return Path(given) if given else None


def cache_folder() -> Path:
    """Where files that can be made again are kept: HF_KERNEL_PATCH_CACHE, or the user's cache.

    Raises:
        RuntimeError: neither is set and the user has no home, as in some containers.
    """
    if given := os.environ.get(f"{PREFIX}_CACHE", "").strip():
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME", "").strip() or Path("~/.cache").expanduser()
    return Path(home, "hf_kernel_patch")


def in_command_line() -> bool:
    """Whether this process is the command ``hf-kernel-patch`` itself."""
    name = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""
    return name == "hf-kernel-patch" or (name == "-m" and "hf_kernel_patch" in sys.orig_argv)


def rank() -> str | None:
    """The rank of this process in a distributed job, by its launcher's variables, or None."""
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or None


def is_rank_zero() -> bool:
    """Whether this process is the first of a distributed job, or not in one."""
    return rank() in (None, "0")


def unknown_variables() -> list[str]:
    """What is wrong with variables that begin as ours do and are none of ours, one text each."""
    found = []
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in VARIABLES:
            # Without what all begin with, which would make all alike.
            endings = [known.removeprefix(PREFIX) for known in VARIABLES]
            alike = nearest(name.removeprefix(PREFIX), endings, 0.6)
            near = " or ".join(f"{PREFIX}{ending}" for ending in alike)
            hint = f"; did you mean {near}?" if near else f". Known: {', '.join(VARIABLES)}"
            found.append(f"unknown variable {cut(name)}{hint}")
    return found


def variable_of(name: str) -> str:
    """The variable for an argument of ``patch_transformers``."""
    return PREFIX if name == "include" else f"{PREFIX}_{name.upper()}"


def text_of(name: str) -> str:
    """What the variable of an argument holds; "" where it is not set or blank."""
    value = os.environ.get(variable_of(name), "")
    return value if value.strip() else ""
