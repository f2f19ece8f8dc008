"""Puts the references in place of the wheel's kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import aten
from .agreement import META_DIFFERS, bound, check_meta, check_returns
from .counter import count
from .memory import alias, convert, is_on_device, tensors, to_device
from .operators import Operator, operators

#: Operators of metadata: the wheel's own.
OF_THE_WHEEL = frozenset({"get_npu_format"})

_libraries: list[torch.library.Library] = []  # an implementation lives as long as its library


def install() -> None:
    """After ``import torch_npu``: every kernel of the device is ours, or the wheel's views."""
    ours = torch.library.Library("npu", "IMPL")
    theirs = torch.library.Library("aten", "IMPL")
    _libraries.extend((ours, theirs))
    aten.install(theirs)
    written = operators()
    for registered in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, _, name = registered.partition("::")
        if namespace == "npu" and name not in OF_THE_WHEEL:
            found = written.get(name)
            kernel = _unwritten(name) if found is None else kernel_of(name, found)
            ours.impl(name, kernel, "PrivateUse1", allow_override=True)


def _unwritten(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"npusim: npu::{name} has no reference")

    return kernel


def kernel_of(name: str, operator: Operator) -> Callable[..., Any]:
    """A kernel that checks a call, runs its reference on the host, and checks the results."""
    packet, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.npu, packet), overload or "default")
    taken, limited = (_parameters(function) for function in operator)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        count(name.removeprefix("_"))  # _npu_moe_token_unpermute is what the public name runs
        arguments = bound(schema, args, kwargs)
        for tensor in tensors(arguments):
            if not is_on_device(tensor):
                raise RuntimeError(f"npusim: npu::{name} with a tensor on {tensor.device}")
        _only_defaults(schema, {n: v for n, v in arguments.items() if n not in taken})
        with torch.no_grad():
            host = convert({n: v for n, v in arguments.items() if n in taken}, _seen)
            if operator.limits is not None:
                operator.limits(**{n: v for n, v in host.items() if n in limited})
            results = convert(operator.reference(**host), to_device)
        check_returns(schema, results)
        if name not in META_DIFFERS:
            check_meta(schema, arguments, results)
        return results

    return kernel


def _parameters(function: Callable[..., Any] | None) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters if function is not None else ())


def _seen(value: Any) -> Any:
    """The alias of a device tensor, which says whether a gradient is wanted."""
    seen = alias(value)
    return seen.requires_grad_() if is_on_device(value) and value.requires_grad else seen


def _only_defaults(schema: Any, arguments: dict[str, Any]) -> None:
    """Raises for an argument that the reference does not know and the caller set."""
    defaults = {a.name: a.default_value for a in schema._schema.arguments}
    for name, value in arguments.items():
        if value is not defaults[name] and value != defaults[name]:
            raise NotImplementedError(f"npusim: {schema} with {name}={value!r}")
