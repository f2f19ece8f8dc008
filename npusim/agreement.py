"""What a call has to agree with: the wheel's registered schema and its meta kernel."""

from __future__ import annotations

from typing import Any

import torch

from .memory import convert, tensors

#: Operators whose meta kernel is not like the operator, and how.
META_DIFFERS: dict[str, str] = {
    "npu_geglu_grad": "the meta kernel has no defaults and returns two tensors, the schema one",
}


class Disagreement(AssertionError):
    """A reference returned what the wheel's schema or meta kernel does not."""


def bound(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The schema's arguments by name, defaults filled in."""
    found: dict[str, Any] = {}
    for argument, value in zip(operator._schema.arguments, args):
        found[argument.name] = value
    for argument in operator._schema.arguments[len(args) :]:
        found[argument.name] = kwargs.get(argument.name, argument.default_value)
    return found


def check_returns(operator: Any, results: Any) -> None:
    """As many results as the schema says, tensors where it says so; None is no tensor at all."""
    types = [returned.type for returned in operator._schema.returns]
    values = [results] if len(types) == 1 else list(results)
    if len(values) != len(types):
        raise Disagreement(f"{operator}: {len(values)} results, the schema has {len(types)}")
    for value, kind in zip(values, types):
        is_tensor = isinstance(kind, torch.TensorType)
        if value is not None and is_tensor is not isinstance(value, torch.Tensor):
            raise Disagreement(f"{operator}: a {type(value).__name__}, the schema says {kind}")


def check_meta(operator: Any, arguments: dict[str, Any], results: Any) -> None:
    """Every resulting tensor has the shape and dtype of the meta kernel's for these arguments.

    ``arguments`` is the outcome of ``bound``. Nothing to check without a meta kernel.
    """
    name = operator._schema.name
    full = f"{name}.{operator._overloadname}".removesuffix(".default")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(full, "Meta"):
        return
    positional = [a.name for a in operator._schema.arguments if not a.kwarg_only]
    given = convert(arguments, _to_meta)
    expected = operator(
        *(given[name] for name in positional),
        **{name: value for name, value in given.items() if name not in positional},
    )
    shown, wanted = _described(results), _described(expected)
    if shown != wanted:
        raise Disagreement(f"{operator}: {shown}, the meta kernel {wanted}")


def _to_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _described(results: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors(results)]
