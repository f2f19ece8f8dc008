"""A ``kernel_config``: of a YAML file or a mapping."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_kernel_patch.errors import cut, nearest, shown, unknown
from hf_kernel_patch.settings.values import UNSET, Include, Names, Options, read_include

#: Keys that a ``kernel_config`` may have beside those that say which kernels.
OTHERS = ("exclude", "models", "backend", "strict", "options")
#: What its keys are alike that is no key of a training file.
OWN = ("kernel_config", "include_kernels")


@dataclass(frozen=True)
class KernelConfig:
    """What a ``kernel_config`` says; a field left UNSET says nothing.

    Attributes:
        where: for messages, "kernel_config" and the file it is in.
        include_key: the key that ``include`` comes from.
        named: the ids under ``name``, also where ``include_kernels`` chooses others or nothing.
        why_nothing: why no kernel is chosen, where the reason is not plain.
    """

    include: Include = UNSET
    exclude: Names | None = UNSET
    models: Names = UNSET
    backend: str = UNSET
    strict: bool | int | str = UNSET
    options: Options = UNSET
    where: str = "kernel_config"
    include_key: str = "include_kernels"
    named: tuple[str, ...] = ()
    why_nothing: str = ""

    def source_of(self, name: str) -> str:
        """For messages: the key that a field comes from, and where that is."""
        return f"{self.include_key if name == 'include' else name} in {self.where}"


#: What ``load_kernel_config`` gave, or what it takes.
Config = KernelConfig | Mapping[str, Any] | str | os.PathLike[str] | None


def load_kernel_config(source: Mapping[str, Any] | str | os.PathLike[str]) -> KernelConfig:
    """Read a ``kernel_config`` from a YAML file's path or a mapping; applies nothing.

    It is the value under the key ``kernel_config``. A file or mapping that has keys of a
    ``kernel_config`` alone is one itself. Any other is a training configuration that asks for
    nothing. Raises ValueError naming the key that is wrong, or the file and the line that is no
    YAML; FileNotFoundError and TypeError for a source that cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        file = cut(os.fspath(source))
        data = _read_yaml(Path(source), file)
        where = f"kernel_config of {file}"
    else:
        data, file, where = source, "the mapping", "kernel_config"
    if data is None:
        return KernelConfig(None, where=where, why_nothing=f"{file} is empty")
    if not isinstance(data, Mapping):
        told = f"{file} holds {shown(data)}" if file != "the mapping" else f"config={shown(data)}"
        raise TypeError(f"{told}: expected a mapping with a kernel_config, or a YAML file of one")
    if "kernel_config" in data:
        data = data["kernel_config"]
        if data is None:
            return KernelConfig(None, where=where, why_nothing=f"{where} has no value")
    elif not _is_one(data, file):
        return KernelConfig(None, where=where, why_nothing=f"{file} has no kernel_config")
    if not isinstance(data, Mapping):
        raise TypeError(
            f"{where}: expected a mapping such as {{include_kernels: auto}}, got {shown(data)}"
        )
    return _read(data, where)


def _is_one(data: Mapping[Any, Any], file: str) -> bool:
    """Whether a mapping is a ``kernel_config`` itself, and no training configuration.

    Raises ValueError where a key is one of ours, misspelt. Not where it is like ``models`` or
    ``name``: a training configuration has keys of its own that are like these.
    """
    known = {"name", "include_kernels", *OTHERS}
    if "include_kernels" in data or known.issuperset(data):
        return True
    for key in data:
        if isinstance(key, str) and nearest(key, OWN, 0.88):
            raise unknown(f"key in {file}", key, {"kernel_config", *known})
    return False


def _read(data: Mapping[Any, Any], where: str) -> KernelConfig:
    known = {"name", "include_kernels", *OTHERS}
    if strange := [key for key in data if key not in known]:
        raise unknown(f"key in {where}", strange[0], known)
    name = read_include(data.get("name", "auto"), f"name in {where}")
    include = read_include(data.get("include_kernels"), f"include_kernels in {where}")
    named = name if isinstance(name, tuple) else ()
    key, why_nothing = "include_kernels", ""
    if name == "measured" and ("include_kernels" not in data or include == "auto"):
        include, key = name, "name"
    elif named and ("include_kernels" not in data or include == "auto"):
        include, key = named, "name"
    elif "include_kernels" not in data:
        why_nothing = f"{where} has no include_kernels"
    # What has no value says nothing.
    others = {key: data[key] for key in OTHERS if data.get(key) is not None}
    return KernelConfig(
        include,
        **others,
        where=where,
        include_key=key,
        named=named,
        why_nothing=why_nothing,
    )


def _read_yaml(path: Path, shown_as: str) -> object:
    """What a YAML file holds; ValueError with its name and the line that cannot be read."""
    import yaml

    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{shown_as} is not in UTF-8: {error.reason} in line {line}") from None

    class Loader(yaml.SafeLoader):
        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except ValueError as error:  # of a number or a date
                raise yaml.MarkedYAMLError(None, None, str(error), node.start_mark) from None

    loader: Any = None
    try:
        loader = Loader(text)
        return loader.get_single_data()
    except RecursionError:
        line = loader.line + 1
        raise ValueError(f"{shown_as} is nested too deeply to be read, in line {line}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        said = ", ".join(part for part in (error.context, error.problem) if part)
    except yaml.YAMLError as error:  # a character that YAML does not allow
        position = getattr(error, "position", 0)
        line, said = text[:position].count("\n") + 1, f"{error}".partition("\n")[0]
    raise ValueError(f"{shown_as} cannot be read as YAML: {cut(said)}, in line {line}")
