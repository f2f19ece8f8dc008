"""What a leaf and a rule are, and the register of both: the code that the tables can name."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import update_wrapper
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeVar

from hf_kernel_patch.errors import shown
from hf_kernel_patch.kernels import provide
from hf_kernel_patch.recognition.edits import Edit, start
from hf_kernel_patch.recognition.function import Function, NoSource, function_of
from hf_kernel_patch.recognition.site import Site, Swallowed
from hf_kernel_patch.recognition.source import canonical, fingerprint, innermost

if TYPE_CHECKING:
    from torch import nn

#: Builds the replacement for one site; its parameters are the original's.
Adapter = Callable[[Site], Callable[..., Any]]


@dataclass(frozen=True)
class Leaf:
    """A whole function that is known by its code.

    Attributes:
        name: as the tables write it, such as "rms_norm.llama".
        op: the op whose kernels serve it.
        variants: source of the function -> adapter. An adapter is called with a Site and returns
            the replacement, a function of the very same parameters.
        helpers: source of what the function calls by name ("rotate_half", or "self._norm" for a
            method), which has to match as well; several sources if any of them will do.
        why_fallback: why the replacement leaves a module as it is now to the original, unless its
            kernel was asked for by name; "" where it does not.
        inherited: whether classes that inherit the function have it replaced too, in modules
            with other code of the same op.
    """

    name: str
    op: str
    variants: Mapping[str, Adapter]
    helpers: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    why_fallback: Callable[[Any], str] = lambda module: ""
    inherited: bool = False

    def adapter_for(self, value: object, owner: object) -> Adapter | str:
        """The adapter for the code that ``value`` runs, or the reason why there is none.

        ``owner`` is the class or the module that holds it.
        """
        function = innermost(value)
        if reason := why_foreign(function, owner):
            return reason
        found = fingerprint(function) if inspect.isfunction(function) else None
        where = _module_of(function)
        if found is None:
            return f"the source of {where} cannot be read"
        adapter = next(
            (a for source, a in self.variants.items() if canonical(source) == found), None
        )
        if adapter is None:
            return f"{where} has other code than the leaf {self.name}"
        for (name, source), (_, _, helper) in zip(
            self.helpers.items(), self.swallowed(function, owner)
        ):
            held = innermost(helper)
            sources = [canonical(s) for s in ((source,) if isinstance(source, str) else source)]
            if not inspect.isfunction(held) or fingerprint(held) not in sources:
                return f"{name} in {where} is another function than the leaf {self.name} calls"
        return adapter

    def why_not(self, value: object, owner: object) -> str | None:
        """Why a value of ``owner`` is not this leaf, or None."""
        adapter = self.adapter_for(value, owner)
        return adapter if isinstance(adapter, str) else None

    def swallowed(self, function: Any, owner: object) -> tuple[Swallowed, ...]:
        """What the function calls by name, where it finds it, as it is now."""
        found: list[Swallowed] = []
        for name in self.helpers:
            method = name.removeprefix("self.")
            if method != name and hasattr(owner, method):
                found.append((None, method, getattr(owner, method)))
            else:
                scope = function.__globals__
                found.append((scope, name, scope.get(name)))
        return tuple(found)


@dataclass(frozen=True)
class Rule:
    """A piece of code inside of a function, and what takes its place.

    Attributes:
        name: as the tables write it, such as "residual_norm".
        op: the op whose kernels serve it.
        find: (function, name of the helper) -> the places and how they are edited, or near misses.
        serve: makes the helper, which the edited text calls, for one site.
        helper: the helper's name in the edited text, where the function has none of that name.
        names: what some name in the function's bytecode has to match; "" for any function. It
            spares most functions a look at their source.
        usual: what such functions are usually called, matched with "Class.method(parameters):
            names in its bytecode"; one that is called so and has no such code is reported.
    """

    name: str
    op: str
    find: Callable[[Function, str], Found]
    serve: Callable[[Site], Callable[..., Any]]
    helper: str
    names: str = ""
    usual: str = ""

    def may_be_in(self, code: CodeType) -> bool:
        """Whether a function of this bytecode may have the rule's code."""
        found = re.compile(self.names).search
        return any(found(name) for name in code.co_names)

    def is_expected_in(self, qualname: str, code: CodeType) -> bool:
        """Whether a function of this name and bytecode is called as those with the rule's code."""
        parameters = ", ".join(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        text = f"{qualname}({parameters}): {' '.join(code.co_names)}"
        return bool(self.usual) and re.match(self.usual, text) is not None

    @property
    def unknown(self) -> str:
        """Why a function holds none of the rule's code, nor what nearly is."""
        return f"no code that the rule {self.name} knows"

    def why_fallback(self, module: nn.Module) -> str:
        """As of a leaf."""
        return ""

    def found_in(
        self, value: object, owner: object, taken: Collection[str] = ()
    ) -> tuple[Function, Found, str] | str:
        """The function that ``value`` runs, the rule's places in it and the name of its helper.

        Or the reason why there are none. ``taken`` are names of other helpers.
        """
        function = innermost(value)
        if reason := why_foreign(function, owner):
            return reason
        if not inspect.isfunction(function):
            return f"{_module_of(function)} has no function there"
        try:
            source = function_of(function)
        except NoSource as error:
            return str(error)
        helper = free_name(source, self.helper, taken)
        found = self.find(source, helper)
        if not found.edits:
            nearly = "; ".join(found.near) or self.unknown
            return f"{function.__qualname__} of {_module_of(function)}: {nearly}"
        return source, found, helper

    def why_not(self, value: object, owner: object) -> str | None:
        """Why a value of ``owner`` holds no such code, or None."""
        found = self.found_in(value, owner)
        return found if isinstance(found, str) else None


@dataclass
class Found:
    """What a rule found in a function.

    Attributes:
        edits: how the text changes; none where the rule does not apply.
        near: where it nearly does, "line 412: the sum is used again".
    """

    edits: list[Edit] = field(default_factory=list)
    near: list[str] = field(default_factory=list)

    def miss(self, node: ast.AST, reason: str) -> None:
        """Note a place where the rule nearly applies."""
        self.near.append(f"line {start(node)[0]}: {reason}")


Known = Leaf | Rule
K = TypeVar("K", Leaf, Rule)
_known: dict[str, Known] = {}


def register(code: K) -> K:
    """Make a leaf or a rule known to the tables by its name; returns it.

    Raises TypeError for anything else.
    """
    if not isinstance(code, (Leaf, Rule)):
        raise TypeError(f"register_code takes a Leaf or a Rule, not {shown(code)}")
    _known[code.name] = code
    return code


provide(register, "register_code")


def known() -> dict[str, Known]:
    """Every registered leaf and rule by name."""
    return _known


def free_name(function: Function, name: str, taken: Collection[str] = ()) -> str:
    """The name, or one like it, that the function does not use and nobody has taken."""
    while name in taken or name in function.names or name in function.value.__code__.co_freevars:
        name += "_"
    return name


def why_foreign(function: object, owner: object) -> str | None:
    """Whose code stands there, if it is neither the owner's module's nor that of transformers."""
    where = _module_of(function)
    if where in _homes(owner) or where.startswith("transformers.models."):
        return None
    return f"patched by {where}: its code is not the original's"


def _module_of(function: object) -> str:
    scope = getattr(function, "__globals__", {})
    return str(scope.get("__name__") or type(function).__module__)


def _homes(owner: object) -> list[str]:
    """The modules whose code is the owner's own."""
    if isinstance(owner, type):
        return [kind.__module__ for kind in owner.__mro__]
    return [owner.__name__]  # type: ignore[attr-defined]


def build(adapter: Adapter, site: Site) -> Callable[..., Any]:
    """What the adapter made for a site, with the original's name and signature.

    Raises TypeError where its parameters are neither the original's nor ``*args, **kwargs``.
    """
    replacement = adapter(site)
    wanted, given = _parameters(innermost(site.original)), _parameters(replacement)
    if given != wanted and [kind for _, kind, _ in given[-2:]] != _ANYTHING:
        raise TypeError(f"{adapter.__qualname__} takes {given}, but the original takes {wanted}")
    keep = ("__dict__",) if inspect.isfunction(site.original) else ()
    update_wrapper(replacement, site.original, updated=keep)
    return replacement


_ANYTHING = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]
