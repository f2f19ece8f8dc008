"""What the settings of now would patch in the installed transformers, found by doing it."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterable
from typing import Any

from hf_kernel_patch import models
from hf_kernel_patch.errors import KernelPatchWarning, cut, listed, shown, unknown
from hf_kernel_patch.patching.block import patched
from hf_kernel_patch.patching.choosing import choose
from hf_kernel_patch.patching.report import Outcome, PatchReport
from hf_kernel_patch.settings import Config
from hf_kernel_patch.workload.finding import cached_file, file_of_folder, not_found


def preview(model: str | None = None, config: Config = None, **arguments: str) -> PatchReport:
    """The report of ``patch_transformers(...)`` in this environment; nothing stays patched.

    Args:
        model: as ``architecture_of`` takes it; every architecture by default.
        config: as ``patch_transformers`` takes it, and so are ``arguments``.

    Raises:
        ValueError: no such architecture, with the near matches, or a setting cannot be read.
        FileNotFoundError: the directory holds no config.json.
    """
    found, _ = choose(config, **arguments)
    wanted = found.models
    chosen = list(models.architectures()) if isinstance(wanted, str) else list(wanted)
    if model is not None:
        name = architecture_of(model)
        if not isinstance(wanted, str) and name not in wanted:
            source = found.sources.get("models", "--models").removeprefix("the variable ")
            return PatchReport(note=f"{source} leaves {name} out")
        chosen = [name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelPatchWarning)  # the rows say the same
        options: dict[str, Any] = {**arguments, "models": chosen, "strict": False}
        with patched(config=config, **options) as report:
            broken = import_modelling(chosen)
    for row in report.pending:
        row.outcome, row.reason = Outcome.SKIPPED, broken[row.architecture]
    return (
        report
        if report.rows or not broken
        else PatchReport(note=listed(dict.fromkeys(broken.values()), "; "))
    )


def architecture_of(model: str) -> str:
    """The name, as ``models=`` takes it, of a model type or of a model with a config.json.

    That is a folder, or a name on the Hub whose files are in the local cache.
    """
    known = models.architectures()
    if model in known:
        return model
    config = file_of_folder(model)
    if config is None and models.find_modules(model):
        return model
    config = config or cached_file(model)
    if config is None:
        raise not_found(model)
    where = cut(str(config))
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} names no model_type: {shown(error)}") from None
    if not isinstance(name, str):
        raise ValueError(f"{where}: model_type is a name, not {shown(name)}")
    found = next((one for one in (name, name.removesuffix("_text")) if one in known), None)
    if found is None and not models.find_modules(name):
        raise unknown(f"model type (of {where})", name, models.names_of_all())
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
                broken[name] = f"{type(error).__name__}: {cut(str(error), 500)}"
    return broken
