"""What the settings of now would patch in the installed transformers, found by doing it."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from hf_kernel_patch import models, settings
from hf_kernel_patch.errors import KernelPatchWarning, shown, unknown
from hf_kernel_patch.patching.block import patched
from hf_kernel_patch.patching.report import Outcome, PatchReport


def preview(model: str | None = None) -> PatchReport:
    """The report of ``patch_transformers()`` in this environment; nothing stays patched.

    Args:
        model: a directory with a model's config.json, or an architecture; all by default.

    Raises:
        ValueError: no such architecture, with the near matches, or a variable cannot be read.
        FileNotFoundError: the directory holds no config.json.
    """
    wanted = settings.resolve().models
    chosen = [table.name for table in models.select(wanted).tables]
    if model is not None:
        name = architecture_of(model)
        if not isinstance(wanted, str) and name not in wanted:
            return PatchReport(note=f"HF_KERNEL_PATCH_MODELS leaves {name} out")
        chosen = [name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelPatchWarning)  # the rows say the same
        with patched(models=chosen, strict=False) as report:
            broken = import_modelling(chosen)
    for row in report.pending:
        row.outcome, row.reason = Outcome.SKIPPED, broken[row.architecture]
    return report if report.rows or not broken else PatchReport(note="; ".join(broken.values()))


def architecture_of(model: str) -> str:
    """The name, as ``models=`` takes it, of a model's directory or a model type."""
    known = models.architectures()
    if model in known:
        return model
    if not os.path.isdir(model):  # Path.is_dir raises for a name too long
        if models.find_modules(model):
            return model
        raise unknown("model type or directory", model, {*known, *models.families()})
    config = Path(model, "config.json")
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except RecursionError:
        raise ValueError(f"{config} is nested too deeply to be read") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} names no model_type: {shown(error)}") from None
    if not isinstance(name, str):
        raise ValueError(f"{config}: model_type is a name, not {shown(name)}")
    found = next((one for one in (name, name.removesuffix("_text")) if one in known), None)
    if found is None and not models.find_modules(name):
        raise unknown(f"model type (of {config})", name, {*known, *models.families()})
    return found or name


def import_modelling(names: Iterable[str]) -> dict[str, str]:
    """Import the modelling modules of architectures; name -> reason of those that fail."""
    tables = models.architectures()
    broken = {}
    for name in names:
        modules = (tables[name].module,) if name in tables else models.find_modules(name)
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # transformers may lack the model, or what it needs
                broken[name] = f"{type(error).__name__}: {error}"
    return broken
