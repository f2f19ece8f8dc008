"""The architectures: one table each, data only."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from dataclasses import dataclass

from hf_kernel_patch.errors import shown, unknown
from hf_kernel_patch.models.families import (
    PREFIX,
    families,
    family_of,
    file_of,
    find_modules,
    is_modelling,
)
from hf_kernel_patch.models.table import Architecture, SiteSpec
from hf_kernel_patch.registry import Scan

__all__ = [
    "PREFIX",
    "Architecture",
    "Selection",
    "SiteSpec",
    "architectures",
    "discovered",
    "families",
    "family_of",
    "file_of",
    "find_modules",
    "is_modelling",
    "is_name",
    "names_of_all",
    "register_model",
    "select",
]

#: Names that tables of the last release may have -> those of now.
RENAMED = {
    **{f"swiglu.{one}": "gated_product" for one in ("gate_up_down", "w1_w3_w2", "halves")},
    **{
        f"decoder_layer.{one}": "residual_norm"
        for one in ("pre_norm", "scaled", "dropout", "four_norms")
    },
    "attention.qk_norm": "qk_norm_rope",
    **{
        f"causal_lm.{one}": "head_loss"
        for one in ("dense", "scaled", "multiplied", "softcap", "moe")
    },
}
_registered: dict[str, Architecture] = {}


def architectures() -> dict[str, Architecture]:
    """Every architecture by name: those of this folder, then a user's own."""
    _scan()
    return _registered


def _import_tables() -> None:
    for found in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(found.name)
        if isinstance(table := getattr(module, "ARCHITECTURE", None), Architecture):
            _registered.setdefault(table.name, table)


_scan = Scan(_import_tables)


def register_model(architecture: Architecture) -> Architecture:
    """Add a table of one's own, or take the place of the one with that name.

    Patches that are in force for "all" models, or for this name, do not change; patch again.
    Raises TypeError for something else than an Architecture and ValueError for an unknown name of
    a leaf or a rule.
    """
    from hf_kernel_patch.recognition import known

    if not isinstance(architecture, Architecture):
        raise TypeError(f"register_model takes an Architecture, not {shown(architecture)}")
    if renamed := {t.code: RENAMED[t.code] for t in architecture.sites if t.code in RENAMED}:
        warnings.warn(
            f"names in the table {architecture.name} are old: write "
            + ", ".join(f"{new!r} for {old!r}" for old, new in renamed.items()),
            DeprecationWarning,
            stacklevel=2,
        )
        architecture.rename(renamed)
    for spec in architecture.sites:
        if spec.code not in known():
            raise unknown("leaf or rule", spec.code, known())
    architectures()[architecture.name] = architecture
    return architecture


def names_of_all() -> set[str]:
    """What ``models=`` can name: tables, families of transformers, and PEFT's layers."""
    return {*architectures(), *families(), "peft"}


def is_name(name: str) -> bool:
    """Whether ``models=`` can name it."""
    return name in names_of_all()


@dataclass(frozen=True)
class Selection:
    """What ``models=`` names: tables, and modules of transformers that none describes.

    ``others`` are the names of those modules, or None for all that have no table.
    """

    tables: tuple[Architecture, ...]
    others: frozenset[str] | None

    def discovers(self, module: str) -> bool:
        """Whether the code of a module is looked for, rather than named by a table."""
        if self.others is not None:
            return module in self.others
        return all(module != table.module for table in architectures().values())


def select(names: str | tuple[str, ...], source: str = "") -> Selection:
    """What ``models=`` names; ValueError for a name that neither we nor transformers know."""
    if isinstance(names, str):
        return Selection(tuple(architectures().values()), None)
    others: set[str] = set()
    for name in names:
        if name not in architectures():
            if not (modules := find_modules(name)):
                raise unknown("model", name, names_of_all(), source)
            others |= set(modules)
    tables = [architectures()[name] for name in names if name in architectures()]
    return Selection(tuple(tables), frozenset(others))


def discovered(module: str) -> list[SiteSpec]:
    """The targets of an imported module whose code was looked for; also what is nearly known."""
    from hf_kernel_patch.recognition.discovery import discover

    found = discover(vars(sys.modules[module]), module)
    return [SiteSpec(module, one.qualname, one.code, near=one.reason) for one in found]
