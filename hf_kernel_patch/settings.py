"""What is asked for: arguments over environment over a config over defaults."""

# The only module that reads os.environ.

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hf_kernel_patch.errors import shown, unknown

PREFIX = "HF_KERNEL_PATCH"
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", "", "none", "null"}


class _Unset:
    """Found by identity, which copies and pickles keep."""

    def __reduce__(self) -> str:
        return "UNSET"

    def __repr__(self) -> str:
        return "<from the environment, else the default>"


UNSET: Any = _Unset()
#: Kernel ids and op names: "id1,id2", or one string each.
Names = str | Iterable[str]
#: "auto" or True, the default kernels; None or False, nothing; otherwise names.
Include = Names | bool | None
#: {op or kernel id: {option: value}}, or "op.option=value,...".
Options = Mapping[str, Mapping[str, Any]] | str | None


@dataclass(frozen=True)
class Settings:
    """One resolved request.

    ``include`` is "auto", None (nothing) or a tuple of kernel ids and op names; ``models`` is "all"
    or a tuple of architecture names.
    """

    include: str | tuple[str, ...] | None = "auto"
    exclude: tuple[str, ...] = ()
    models: str | tuple[str, ...] = "all"
    backend: str = "auto"
    strict: bool = False
    #: (op or kernel id, option, value), as given.
    options: tuple[tuple[str, str, object], ...] = ()
    #: Where a field was given, for messages, unless it was an argument.
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)


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


def resolve(config: Config = None, **arguments: object) -> Settings:
    """Settings from arguments that are not UNSET, else environment, else ``config``, else defaults.

    Raises ValueError or TypeError naming the argument or the variable that cannot be read.
    """
    if config is not None and not isinstance(config, KernelConfig):
        config = load_kernel_config(config)
    chosen: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name in (one.name for one in fields(KernelConfig)):
        variable = _variable(name)
        if arguments.get(name, UNSET) is not UNSET:
            value, source = arguments[name], f"the argument {name}"
        elif name != "exclude" and os.environ.get(variable, "").strip():
            value = os.environ[variable]
            source = sources[name] = f"the variable {variable}"
        elif config is not None and getattr(config, name) is not UNSET:
            value = getattr(config, name)
            source = sources[name] = f"{name} in kernel_config"
        else:
            continue
        chosen[name] = _read(name, value, source)
    if disabled():
        chosen["include"] = None
    return replace(Settings(), sources=sources, **chosen)


def disabled() -> bool:
    """Whether HF_KERNEL_PATCH_DISABLE switches everything off."""
    return flag("DISABLE")


def flag(name: str, default: bool = False) -> bool:
    """The truth of the variable HF_KERNEL_PATCH_<name>; ValueError where it cannot be read."""
    variable = f"{PREFIX}_{name}"
    value = os.environ.get(variable, "")
    return _boolean(value, f"the variable {variable}") if value.strip() else default


def requested_by_environment() -> bool:
    """Whether HF_KERNEL_PATCH asks for patching at import."""
    return bool(os.environ.get(PREFIX, "").strip()) and resolve().include is not None


def child_environment(directory: str, options: Mapping[str, str]) -> dict[str, str]:
    """A copy of the environment for a child that is to be patched.

    Args:
        directory: goes first on PYTHONPATH.
        options: values for the variables, by the arguments' names ("include", "models", ...).
            HF_KERNEL_PATCH is "auto" where neither they nor the environment say anything.
    """
    child = dict(os.environ)
    path = [entry for entry in child.get("PYTHONPATH", "").split(os.pathsep) if entry]
    child["PYTHONPATH"] = os.pathsep.join([directory, *(e for e in path if e != directory)])
    if not child.get(PREFIX, "").strip():
        child[PREFIX] = "auto"
    return {**child, **{_variable(name): value for name, value in options.items()}}


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


def cache_folder() -> Path:
    """Where files that can be made again are kept: HF_KERNEL_PATCH_CACHE, or the user's cache."""
    given = os.environ.get(f"{PREFIX}_CACHE", "").strip()
    home = os.environ.get("XDG_CACHE_HOME", "").strip() or str(Path("~/.cache").expanduser())
    return Path(given) if given else Path(home, "hf_kernel_patch")


def in_command_line() -> bool:
    """Whether this process is the command ``hf-kernel-patch`` itself."""
    name = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""
    return name == "hf-kernel-patch" or (name == "-m" and "hf_kernel_patch" in sys.orig_argv)


def is_rank_zero() -> bool:
    """Whether this process is the first of a distributed job, or not in one."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return rank == "0"


def read_include(value: Include, source: str = "include") -> str | tuple[str, ...] | None:
    """auto, True, False, None, "id1,id2" or an iterable of ids, as Settings.include holds it."""
    if value is None or value is False:
        return None
    if value is True:
        return "auto"
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _FALSE:
            return None
        if text == "auto" or text in _TRUE:
            return "auto"
    names = _names(value, source)
    if "auto" in names:
        raise ValueError(
            f"{source}: 'auto' stands alone, it cannot be mixed with ids: {shown(value)}"
        )
    return names


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


def _variable(name: str) -> str:
    return PREFIX if name == "include" else f"{PREFIX}_{name.upper()}"


def _read(name: str, value: Any, source: str) -> Any:
    if name == "include":
        return read_include(value, source)
    if name == "exclude":
        return _names(value, source) if value is not None else ()
    if name == "models":
        names = _names(value, source)
        return "all" if names in (("all",), ("auto",)) else names
    if name == "options":
        return _options(value, source)
    if name == "strict":
        return value if isinstance(value, bool) else _boolean(value, source)
    if not isinstance(value, str):
        raise TypeError(f"{source} must be a string, not {shown(value)}")
    return value.strip().lower() or "auto"


def _options(value: object, source: str) -> tuple[tuple[str, str, object], ...]:
    """{op or id: {option: value}}, or "op.option=value,..."; the registry checks the names."""
    if value is None:
        return ()
    if isinstance(value, str):
        found = []
        for part in _names(value, source):
            name, given, text = part.partition("=")
            owner, dot, option = name.strip().partition(".")
            if not (given and dot):
                raise ValueError(f"{source}: {shown(part)} is not of the form op.option=value")
            found.append((owner, option, text.strip()))
        return tuple(found)
    if not isinstance(value, Mapping) or not all(isinstance(v, Mapping) for v in value.values()):
        raise TypeError(f"{source} must map ops to mappings of options, not {shown(value)}")
    return tuple((_word(o), _word(n), one) for o, held in value.items() for n, one in held.items())


def _word(key: object) -> str:
    return key if isinstance(key, str) else shown(key)


def _names(value: object, source: str) -> tuple[str, ...]:
    parts: object = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Iterable) or isinstance(parts, (bytes, Mapping)):
        raise TypeError(f"{source} must be a string or an iterable of strings, not {shown(value)}")
    names = []
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"{source} holds {shown(part)}, which is not a string")
        if part.strip():
            names.append(part.strip())
    return tuple(dict.fromkeys(names))


def _boolean(value: object, source: str) -> bool:
    text = value.strip().lower() if isinstance(value, str) else None
    if text not in _TRUE | _FALSE:
        raise ValueError(f"{source} must be one of 1, 0, true, false; got {shown(value)}")
    return text in _TRUE
