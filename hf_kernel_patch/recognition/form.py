"""What a form is, and the register of all forms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any

from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import canonical, fingerprint, innermost

#: Builds the replacement for one site; its parameters are the original's.
Adapter = Callable[[Site], Callable[..., Any]]


@dataclass(frozen=True)
class Form:
    """One canonical piece of source that an op can replace.

    Attributes:
        name: as the tables write it, such as "rms_norm.llama".
        op: the op whose kernels serve it.
        variants: source of the function -> adapter. An adapter is called with a Site and returns
            the replacement, a function of the very same parameters.
        helpers: source of what the function calls by name ("rotate_half", or "self._norm" for a
            method), which has to match as well; several sources if any of them will do.
        unserved: why no op serves this code, for a form without variants: it is in a table for
            the report to say so.
        leaves: why the replacement leaves a module as it is now to the original, unless its
            kernel was asked for by name; "" where it does not.
    """

    name: str
    op: str
    variants: Mapping[str, Adapter]
    helpers: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    unserved: str = ""
    leaves: Callable[[Any], str] = lambda module: ""

    def adapter_for(self, value: Any, owner: Any) -> Adapter | str:
        """The adapter for the code that ``value`` runs, or the reason why there is none.

        ``owner`` is the class or the module that holds it.
        """
        if self.unserved:
            return self.unserved
        function = innermost(value)
        found = fingerprint(function) if inspect.isfunction(function) else None
        where = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
        if where not in _homes(owner) and not where.startswith("transformers.models."):
            return f"patched by {where}: its code is not the original's"
        if found is None:
            return f"the source of {where} cannot be read"
        adapter = next(
            (a for source, a in self.variants.items() if canonical(source) == found), None
        )
        if adapter is None:
            return f"{where} has other code than the form {self.name}"
        for name, source in self.helpers.items():
            method = name.removeprefix("self.")
            held = getattr(owner, method, None) if method != name else None
            helper = innermost(held or function.__globals__.get(name))
            sources = [canonical(s) for s in ((source,) if isinstance(source, str) else source)]
            if not inspect.isfunction(helper) or fingerprint(helper) not in sources:
                return f"{name} in {where} is another function than the form {self.name} calls"
        return adapter


def _homes(owner: Any) -> list[str]:
    """The modules whose code is the owner's own."""
    if isinstance(owner, type):
        return [kind.__module__ for kind in owner.__mro__]
    return [owner.__name__]


_forms: dict[str, Form] = {}


def register_form(form: Form) -> Form:
    """Make a form known to the tables by its name."""
    _forms[form.name] = form
    return form


def forms() -> dict[str, Form]:
    """Every registered form by name."""
    return _forms


def build(adapter: Adapter, site: Site) -> Callable[..., Any]:
    """The replacement for a site: what the adapter made, with the original's name and signature.

    Raises TypeError where its parameters are neither the original's nor ``*args, **kwargs``.
    """
    replacement = adapter(site)
    wanted, given = _parameters(innermost(site.original)), _parameters(replacement)
    if given != wanted and [kind for _, kind, _ in given[-2:]] != _ANYTHING:
        raise TypeError(f"{adapter.__qualname__} takes {given}, but the original takes {wanted}")
    replacement = _checkpointing(replacement, site.original)
    keep = ("__dict__",) if inspect.isfunction(site.original) else ()
    update_wrapper(replacement, site.original, updated=keep)
    replacement.__hf_kernel_patch__ = site  # type: ignore[attr-defined]
    site.replacement = replacement
    return replacement


def _checkpointing(replacement: Callable[..., Any], original: Any) -> Callable[..., Any]:
    """The replacement in the wrapper that checkpoints a layer, if the original is in it.

    Since 5.23 transformers puts it around the forward of every class of layers, which is how to
    come by one; before, the layers' ``__call__`` does the same.
    """
    code = getattr(original, "__code__", None)
    if code is None or not code.co_qualname.startswith("GradientCheckpointingLayer."):
        return replacement
    from transformers.modeling_layers import GradientCheckpointingLayer

    kind: Any = type("Layer", (GradientCheckpointingLayer,), {"forward": replacement})
    wrapped: Callable[..., Any] = kind.forward
    return wrapped


_ANYTHING = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]
