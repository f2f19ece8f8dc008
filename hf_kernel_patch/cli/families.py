"""What is found in the model families of the installed transformers: without importing them."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from hf_kernel_patch import models, recognition, settings
from hf_kernel_patch.cli.preview import architecture_of, import_modelling
from hf_kernel_patch.errors import KernelPatchError
from hf_kernel_patch.recognition import known
from hf_kernel_patch.recognition.discovery import discover
from hf_kernel_patch.recognition.static import scope_of
from hf_kernel_patch.version import versions


class Family(TypedDict):
    """What is found in a family: ops, whether it has a table, and why it cannot be read, if so."""

    ops: list[str]
    listed: bool
    failed: str


#: (families looked at, all) -> shown as progress.
Progress = Callable[[int, int], None]


def found_in_families(progress: Progress) -> dict[str, Family]:
    """What is found in each family, by its name.

    What was found before with these versions comes from a file in the cache's folder.
    """
    if not models.families():
        raise KernelPatchError("transformers is not installed, so there is no family to look at")
    file = settings.cache_folder() / f"families-{_key()}.json"
    try:
        found: dict[str, Family] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = _look(progress)
        _keep(file, found)
    return found


def table_of(model: str) -> str:
    """The table of a model, as a file of Python that could be added to ``models/``.

    Of a family without a table it is what is found in its code. Raises ValueError for an unknown
    model or one that cannot be imported, and as ``architecture_of``.
    """
    name = architecture_of(model)
    listed = models.architectures().get(name)
    if broken := import_modelling([name]):
        raise ValueError(f"{name} cannot be imported: {broken[name]}")
    modules = (listed.module,) if listed else models.find_modules(name)
    specs = (
        list(listed.sites)
        if listed
        else [spec for module in modules for spec in models.discovered(module)]
    )
    lines = [
        '        "' + one.qualname + '": ' + _row(one) + ","
        for one in sorted(specs, key=lambda spec: modules.index(spec.module))
        if not one.near
    ]
    near = [f"    # {one.qualname}: {one.near}" for one in specs if one.near]
    head = f'ARCHITECTURE = Architecture(\n    "{models.family_of(modules[0])}",\n    {{'
    imported = "from hf_kernel_patch.models.table import Architecture"
    return "\n".join([imported, "", head, *lines, "    },", *near, ")"])


def _row(spec: models.SiteSpec) -> str:
    if spec.transformers:
        return f'("{spec.code}", "{spec.transformers}")'
    return f'"{spec.code}"'


def _look(progress: Progress) -> dict[str, Family]:
    families = models.families()
    listed = {table.module for table in models.architectures().values()}
    found: dict[str, Family] = {}
    for number, (family, modules) in enumerate(families.items()):
        progress(number, len(families))
        ops: set[str] = set()
        failed = ""
        for module in modules:
            try:
                scope = scope_of(models.file_of(module), module)
            except (OSError, SyntaxError, ValueError) as error:
                failed = f"{type(error).__name__}: {error}"
                continue
            ops |= {known()[one.code].op for one in discover(scope, module) if not one.reason}
        found[family] = {"ops": sorted(ops), "listed": bool(listed & {*modules}), "failed": failed}
    progress(len(families), len(families))
    return found


def _keep(file: Path, found: dict[str, Family]) -> None:
    """Write a file wholly or not at all; a folder that cannot be written is no mistake."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(file)
    except OSError:
        pass


def _key() -> str:
    """What the answer depends on: versions, the code that knows code, and the code it looks at."""
    ours = Path(str(importlib.import_module(recognition.__name__).__file__)).parent
    tables = Path(str(importlib.import_module(models.__name__).__file__)).parent
    files = sorted([*ours.rglob("*.py"), *tables.rglob("*.py")])
    files += [models.file_of(one) for family in models.families().values() for one in family]
    seen = [str(versions()), *(f"{one} {one.stat().st_mtime_ns}" for one in files)]
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:16]
