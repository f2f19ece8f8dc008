"""The architectures: one table each, data only."""

from __future__ import annotations

import importlib
import pkgutil

from hf_kernel_patch.errors import unknown
from hf_kernel_patch.models.table import Architecture, Target

__all__ = ["Architecture", "Target", "architectures", "register_model", "select"]

_registered: dict[str, Architecture] = {}
_scanned = False


def architectures() -> dict[str, Architecture]:
    """Every architecture by name: those of this folder, then a user's own."""
    global _scanned
    if not _scanned:
        _scanned = True
        for found in pkgutil.iter_modules(__path__, f"{__name__}."):
            module = importlib.import_module(found.name)
            if isinstance(table := getattr(module, "ARCHITECTURE", None), Architecture):
                _registered.setdefault(table.name, table)
    return _registered


def register_model(architecture: Architecture) -> Architecture:
    """Add a table of one's own, or take the place of the one with that name.

    Patches that are in force for "all" models, or for this name, do not change; patch again.
    Raises TypeError for something else than an Architecture and ValueError for an unknown form.
    """
    from hf_kernel_patch.recognition import forms

    if not isinstance(architecture, Architecture):
        raise TypeError(f"register_model takes an Architecture, not {architecture!r}")
    for target in architecture.targets:
        if target.form not in forms():
            raise unknown("form", target.form, forms())
    architectures()[architecture.name] = architecture
    return architecture


def select(names: str | tuple[str, ...], source: str = "") -> list[Architecture]:
    """The architectures that ``models=`` names; ValueError for an unknown name."""
    if isinstance(names, str):
        return list(architectures().values())
    for name in names:
        if name not in architectures():
            raise unknown("model", name, architectures(), source)
    return [architectures()[name] for name in names]
