"""The variants of a model: as it is, patched, each op alone, each op left out, compiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

EAGER, PATCHED, COMPILED = "eager", "patched", "compile"


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    Attributes:
        name: as tables have it.
        arguments: of ``patched``, or None where nothing is patched.
        op: the one that is alone or left out.
        compiled: whether torch.compile goes around the model.
    """

    name: str
    arguments: Mapping[str, Any] | None = None
    op: str = ""
    compiled: bool = False


def alone(op: str) -> str:
    """The name of the variant that has one op alone."""
    return f"{op} alone"


def without(op: str) -> str:
    """The name of the variant that has all ops but one."""
    return f"without {op}"


def plan(
    arguments: Mapping[str, Any],
    excluded: Iterable[str],
    ops: Iterable[str],
    each: bool,
    compiled: bool,
) -> list[Variant]:
    """All variants, eager first and patched second.

    Args:
        arguments: of ``patched``, for the whole.
        excluded: what they leave out, wherever that was said.
        ops: those that the whole has a kernel for.
        each: whether every op is measured alone and left out.
        compiled: whether the model that torch.compile makes is one of them.
    """
    # An op is left out, and the others are not named: a kernel that somebody names serves calls
    # that "auto" leaves to the original.
    ops, excluded = tuple(ops), tuple(excluded)
    made = [Variant(EAGER), Variant(PATCHED, arguments)]
    for op in ops if each else ():
        others = [one for one in ops if one != op]
        made.append(Variant(alone(op), {**arguments, "exclude": (*excluded, *others)}, op))
    for op in ops if each else ():
        made.append(Variant(without(op), {**arguments, "exclude": (*excluded, op)}, op))
    return [*made, Variant(COMPILED, compiled=True)] if compiled else made
