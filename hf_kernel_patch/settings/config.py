"""A ``kernel_config``: of a YAML file or a mapping."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_kernel_patch.errors import shown, unknown
from hf_kernel_patch.settings.values import UNSET, Include, Names, Options, read_include


@dataclass(frozen=True)
class KernelConfig:
    """What a ``kernel_config`` says; a field left UNSET says nothing."""

    include: Include = UNSET
    exclude: Names | None = UNSET
    models: Names = UNSET
    backend: str = UNSET
    strict: bool | str = UNSET
    options: Options = UNSET


#: What ``load_kernel_config`` gave, or what it takes.
Config = KernelConfig | Mapping[str, Any] | str | os.PathLike[str] | None


def load_kernel_config(source: Mapping[str, Any] | str | os.PathLike[str]) -> KernelConfig:
    """Read a ``kernel_config`` from a YAML file's path or a mapping; applies nothing.

    The mapping, or its value under ``kernel_config``, holds ``name`` ("auto" or kernel ids) and
    ``include_kernels`` (null, true, false, "auto" or "id1,id2"; null by default), and may hold
    ``exclude``, ``models``, ``backend``, ``strict`` and ``options``. Raises ValueError naming the
    key that is wrong, or the file that is no YAML; FileNotFoundError and TypeError for a source
    that cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        data, where = _read_yaml(Path(source)), str(source)
    else:
        data, where = source, "kernel_config"
    if isinstance(data, Mapping) and "kernel_config" in data:
        data = data["kernel_config"]
    if not isinstance(data, Mapping):
        raise TypeError(f"{where}: expected a mapping or a YAML file of one, got {shown(data)}")
    others = ("exclude", "models", "backend", "strict", "options")
    known = {"name", "include_kernels", *others}
    if strange := [key for key in data if key not in known]:
        raise unknown(f"key in {where}", strange[0], known)
    ids = read_include(data.get("name", "auto"), f"name in {where}")
    include = read_include(data.get("include_kernels"), f"include_kernels in {where}")
    if isinstance(ids, tuple) and ("include_kernels" not in data or include == "auto"):
        include = ids
    return KernelConfig(include=include, **{key: data[key] for key in others if key in data})


def _read_yaml(path: Path) -> object:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of a number or of the encoding
        raise ValueError(f"{path} cannot be read as YAML: {str(error)[:500]}") from error
