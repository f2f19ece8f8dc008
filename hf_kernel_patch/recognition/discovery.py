"""Finding known code in a module that no table describes, and what nearly is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from hf_kernel_patch.ops._shared.collection import no_collection
from hf_kernel_patch.recognition.edits import CannotRewrite, edited
from hf_kernel_patch.recognition.function import NoSource, function_of
from hf_kernel_patch.recognition.known import Leaf, Rule, known, why_foreign
from hf_kernel_patch.recognition.source import canonical, fingerprint, innermost, original_of


class Finding(NamedTuple):
    """A function of a module by its qualified name, and the leaf or rule by which it is known.

    ``reason`` says why it is not: it only looks like the code of an op.
    """

    qualname: str
    code: str
    reason: str = ""


def discover(scope: Mapping[str, object], module: str) -> list[Finding]:
    """What is known, and what nearly is, among the classes and functions that a module defines.

    ``scope`` are the module's globals and ``module`` its name.
    """
    found: list[Finding] = []
    # Syntax trees are many objects and little garbage: collecting it takes a third of the time.
    with no_collection():
        for qualname, value, owner in _members(scope, module):
            function: Any = innermost(original_of(value))
            if isinstance(function, FunctionType) and why_foreign(function, owner) is None:
                found += _findings(qualname, original_of(value), function, owner)
        return found + _inherited(scope, module, {known()[one.code].op for one in found})


def _inherited(scope: Mapping[str, object], module: str, ops: set[str]) -> list[Finding]:
    """What classes of the module inherit and leaves of these ops ask for."""
    asking = [
        leaf
        for leaf in known().values()
        if isinstance(leaf, Leaf) and leaf.inherited and leaf.op in ops
    ]
    kinds = [one for one in scope.values() if isinstance(one, type) and one.__module__ == module]
    return [
        Finding(f"{kind.__qualname__}.{name}", leaf.name)
        for leaf in asking
        for name in _called(leaf)
        for kind in kinds
        if name not in vars(kind) and leaf.why_not(getattr(kind, name, None), kind) is None
    ]


def _called(leaf: Leaf) -> list[str]:
    """The names of a leaf's functions in their texts."""
    names = [re.search(r"def (\w+)", source) for source in leaf.variants]
    return sorted({name[1] for name in names if name})


def _members(scope: Mapping[str, object], module: str) -> Iterator[tuple[str, Any, Any]]:
    """(qualified name, value, owner) of every function and method that the module defines."""
    owner = _Module(module, scope)
    for name, value in list(scope.items()):
        if isinstance(value, type):
            if value.__module__ == module and value.__qualname__ == name:
                for method, held in list(vars(value).items()):
                    yield f"{name}.{method}", held, value
        elif callable(value) and _home(value) == module:
            yield name, value, owner


class _Module:
    """What a leaf asks of the module that holds it."""

    def __init__(self, name: str, scope: Mapping[str, object]):
        self.__name__ = name
        vars(self).update({k: v for k, v in scope.items() if not k.startswith("__")})


def _home(value: object) -> str:
    return getattr(innermost(original_of(value)), "__globals__", {}).get("__name__", "")


class _Known(NamedTuple):
    """What is remembered of a function: the leaves and rules that fit it, and what nearly does."""

    codes: int
    findings: tuple[tuple[str, str], ...]


#: By function, since a module is looked at again after a reload, or as a notebook goes on.
_seen: WeakKeyDictionary[FunctionType, _Known] = WeakKeyDictionary()


def _findings(qualname: str, value: object, function: FunctionType, owner: object) -> list[Finding]:
    seen = _seen.get(function)
    if seen is None or seen.codes != len(known()):
        codes = tuple(_looked_up(qualname, value, function, owner))
        seen = _seen[function] = _Known(len(known()), codes)
    return [Finding(qualname, code, reason) for code, reason in seen.findings]


def _looked_up(
    qualname: str, value: object, function: FunctionType, owner: object
) -> Iterator[tuple[str, str]]:
    """(leaf or rule, reason why it only looks like it) for a function."""
    code = function.__code__
    for leaf in _leaves_like(code):
        if leaf.why_not(value, owner) is None:
            yield leaf.name, ""
            return
    near: list[tuple[str, str]] = []
    for rule in [one for one in known().values() if isinstance(one, Rule)]:
        if not _is_layer(owner):
            break
        reason = _why_no_rule(rule, function) if rule.may_be_in(code) else ""
        if reason is None:
            yield rule.name, ""
        elif reason or rule.is_expected_in(qualname, code):
            near.append((rule.name, reason or rule.unknown))
    yield from near
    if (nearest := _nearest(qualname, function)) is not None:
        yield nearest


def _is_layer(owner: object) -> bool:
    from torch import nn

    return isinstance(owner, type) and issubclass(owner, nn.Module)


def _why_no_rule(rule: Rule, function: FunctionType) -> str | None:
    """None where a rule fits a method, else where it nearly does, or ""."""
    try:
        source = function_of(function)
        found = rule.find(source, rule.helper)
        if found.edits:
            edited(source, found.edits)
            return None
    except (NoSource, CannotRewrite) as error:
        return str(error)
    return "; ".join(found.near)


@cache
def _by_names(count: int) -> dict[tuple[Any, ...], list[Leaf]]:
    """What the bytecode of a leaf's text names -> the leaves; ``count`` is how many are known."""
    found: dict[tuple[Any, ...], list[Leaf]] = {}
    for leaf in [one for one in known().values() if isinstance(one, Leaf)]:
        for source in leaf.variants:
            found.setdefault(_names(_compiled(source)), []).append(leaf)
    return found


def _leaves_like(code: CodeType) -> list[Leaf]:
    """The leaves that a function may be, by what its bytecode names: far cheaper than its text."""
    return _by_names(len(known())).get(_names(code), [])


def _names(code: CodeType) -> tuple[Any, ...]:
    given = code.co_argcount + code.co_kwonlyargcount
    return frozenset(code.co_names), code.co_varnames[:given]


def _compiled(source: str) -> CodeType:
    code = compile(canonical(source), "<leaf>", "exec", dont_inherit=True)
    return next(one for one in code.co_consts if isinstance(one, CodeType))


#: What the code of an op's leaves is usually called.
_LOOKS_LIKE = {
    "rms_norm": re.compile(r"\w*RMS_?Norm\w*\.forward$"),
    "rope": re.compile(r"(?:\w*\.)?apply_\w*rotary\w*$"),
    "moe": re.compile(r"\w*Experts\.forward$"),
}


def _nearest(qualname: str, function: FunctionType) -> tuple[str, str] | None:
    """The leaf whose text is nearest to a function that is called as those of an op are."""
    op = next((op for op, named in _LOOKS_LIKE.items() if named.match(qualname)), None)
    texts = [
        (canonical(source), leaf.name)
        for leaf in known().values()
        if isinstance(leaf, Leaf) and leaf.op == op
        for source in leaf.variants
    ]
    if not texts:
        return None
    text = fingerprint(function)
    if text is None:
        return texts[0][1], f"the source of {function.__module__} cannot be read"
    like = difflib.SequenceMatcher(None, "", text)
    _, nearest = max((_likeness(like, known_text), name) for known_text, name in texts)
    return nearest, f"no known code; the nearest is the leaf {nearest}"


def _likeness(matcher: difflib.SequenceMatcher[str], text: str) -> float:
    matcher.set_seq1(text)
    return matcher.quick_ratio()
