"""From what a user gives to the kernels of a patch: whatever is wrong is told here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hf_kernel_patch import devices, models, registry, settings
from hf_kernel_patch.errors import shown
from hf_kernel_patch.kernels import Kernel
from hf_kernel_patch.measuring.measurement import Measurement
from hf_kernel_patch.patching import bisection, log
from hf_kernel_patch.patching.global_patch import Activation
from hf_kernel_patch.patching.report import PatchReport
from hf_kernel_patch.settings import UNSET, Config, Include, KernelConfig, Settings


def load_kernel_config(source: Mapping[str, Any] | str | os.PathLike[str]) -> KernelConfig:
    """Read a ``kernel_config`` from a YAML file's path or a mapping; applies nothing.

    A training file has it under the key ``kernel_config``; without that key, or without a value
    for it, nothing is patched. A file that has the keys of a ``kernel_config`` alone is one itself:

    - ``name``: "auto", "measured" or kernel ids
    - ``include_kernels``: null (the default) or false, nothing; true or "auto", the default
      kernels; "measured", those that pay; otherwise ids and ops, as "id1,id2" or a list
    - ``exclude``, ``models``, ``backend``, ``strict`` and ``options``: as ``patch_transformers``
      takes them; null means the default

    Raises:
        ValueError: the key or the kernel that is unknown, or the file and the line that is no YAML.
        TypeError: a value of a wrong type.
        FileNotFoundError: no such file.
    """
    config = settings.load_kernel_config(source)
    _check_names(config.named, f"name in {config.where}")
    if isinstance(config.include, tuple):
        _check_names(config.include, config.source_of("include"))
    return config


def choose(config: Config = None, **arguments: object) -> tuple[Settings, dict[str, Kernel]]:
    """What arguments, environment and config ask for, and the kernel for each op.

    Raises whatever is wrong with them: it is called where a user gives them.
    """
    if config is not None and not isinstance(config, KernelConfig):
        config = load_kernel_config(config)
    wanted = settings.resolve(config, **arguments)
    return wanted, select(wanted)


def select(wanted: Settings) -> dict[str, Kernel]:
    """The kernel for each op; ValueError for a name that nothing has."""
    _check_models(wanted.models, wanted.sources.get("models", ""))
    if isinstance(wanted.include, tuple):
        _check_names(wanted.include, wanted.sources.get("include", ""))
    chosen = registry.select(wanted.include, wanted.exclude, wanted.backend, wanted.sources)
    for kernel in chosen.values():
        registry.options_of(kernel, wanted.options)
    return chosen


def activation_of(wanted: Settings, kernels: dict[str, Kernel]) -> Activation:
    """The patch of what was chosen, not applied yet."""
    named = isinstance(wanted.include, tuple)
    return Activation(wanted, kernels, named, measurement_of(wanted, kernels))


def measurement_of(wanted: Settings, kernels: dict[str, Kernel]) -> Measurement | None:
    """What measures for a patch, where it is to measure.

    Not while sites are bisected: then every run has to do the same.
    """
    if wanted.include != "measured" or not kernels:
        return None
    if bisection.current() is not None:
        return None
    return Measurement(kernels, wanted.options, wanted.exclude, log.tell)


def report_of(made: Activation) -> PatchReport:
    """What is reported of a patch, and why it is nothing if it is."""
    return PatchReport(made.rows, "" if made.rows else why_nothing(made.settings.why_nothing))


def auto_unless_said(include: Include, config: Config) -> Include:
    """What a user's ``include`` means for one model: "auto" where neither it nor a file says."""
    return "auto" if include is UNSET and config is None else include


def why_nothing(why: str = "") -> str:
    """Why no kernel is chosen."""
    if settings.disabled():
        return "HF_KERNEL_PATCH_DISABLE is set"
    if why:
        return why
    if missing := devices.missing_package("torch"):
        return f"{missing} is not installed"
    return "no kernel is chosen" if registry.defaults() else "no default kernel for this device"


def _check_names(names: tuple[str, ...], source: str) -> None:
    """ValueError for the first that is no kernel's id and no op."""
    for name in names:
        if not registry.is_name(name) and models.is_name(name):
            raise ValueError(
                f"{shown(name)}{_in(source)} is a model type, not a kernel or an op: write "
                f"models={name!r} to patch models of that type alone (HF_KERNEL_PATCH_MODELS, or "
                "--models in the command line)"
            )
    registry.require(names, source)


def _check_models(names: str | tuple[str, ...], source: str) -> None:
    """ValueError for the first that is no model type."""
    for name in () if isinstance(names, str) else names:
        if registry.is_name(name) and not models.is_name(name):
            raise ValueError(
                f"{shown(name)}{_in(source)} is a kernel or an op, not a model type: write "
                f"include={name!r} (HF_KERNEL_PATCH, or --include in the command line)"
            )
    models.select(names, source)


def _in(source: str) -> str:
    return f" in {source}" if source else ""
