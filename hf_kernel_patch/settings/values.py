"""What a setting may be, and how it is read from text or a value of Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hf_kernel_patch.errors import shown

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
#: "auto" or True, the default kernels; "measured", those of them that pay here; None or False,
#: nothing; otherwise names.
Include = Names | bool | None
#: {op or kernel id: {option: value}}, or "op.option=value,...".
Options = Mapping[str, Mapping[str, Any]] | str | None


def read_include(value: Include, source: str = "include") -> str | tuple[str, ...] | None:
    """auto, measured, True, False, None, "id1,id2" or ids, as Settings.include holds it."""
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
        if text == "measured":
            return text
    if hasattr(value, "named_modules"):
        raise TypeError(
            f"{source} takes names of kernels, not a model; to patch one model and no other call "
            "apply_default_kernels(model)"
        )
    if hasattr(value, "kernel_id"):
        raise TypeError(f"{source} takes ids, not kernels: write {shown(value.kernel_id)}")
    if callable(value):
        raise TypeError(
            f"{source} takes names of kernels, not {shown(value)}; to decorate a function write "
            "@patched()"
        )
    names = _names(value, source)
    if names == ("measured",):
        return "measured"
    for word in ("auto", "measured"):
        if word in names:
            raise ValueError(
                f"{source}: {word!r} stands alone, it cannot be mixed with ids: {shown(value)}"
            )
    return names


def read(name: str, value: Any, source: str) -> Any:
    """A setting as ``Settings`` holds it; ValueError or TypeError naming ``source``."""
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
        return value if isinstance(value, bool) else read_boolean(value, source)
    if not isinstance(value, str):
        raise TypeError(f"{source} must be a string, not {shown(value)}")
    return value.strip().lower() or "auto"


def text_for(value: Any) -> str:
    """A field of ``Settings`` as the text of its variable."""
    if value is None or isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, str):
        return value
    return ",".join(one if isinstance(one, str) else "{}.{}={}".format(*one) for one in value)


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
        raise TypeError(
            f"{source} must map ops to mappings of options, such as "
            f"{{'linear_cross_entropy': {{'exact': True}}}}, not {shown(value)}"
        )
    for name in (*value, *(one for held in value.values() for one in held)):
        if not isinstance(name, str):
            raise TypeError(f"{source}: names of ops and options are strings, not {shown(name)}")
    return tuple((o, n, one) for o, held in value.items() for n, one in held.items())


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


def read_boolean(value: object, source: str) -> bool:
    """1, 0, true, false and the like."""
    text = value.strip().lower() if isinstance(value, str) else None
    if type(value) is int and value in (0, 1):
        text = str(value)
    if text not in _TRUE | _FALSE:
        raise ValueError(f"{source} must be one of 1, 0, true, false; got {shown(value)}")
    return text in _TRUE
