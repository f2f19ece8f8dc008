"""What a language model's forward is given, and which calls of it have a graph in common."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_kernel_patch.recognition.function import Function

if TYPE_CHECKING:
    import torch

#: What transformers calls the parameter with the cache; "cache" since 5.24.
CACHE_NAMES = {"past_key_values", "cache"}
#: What a call may ask for that a graph does not give.
_ASKS = ("output_attentions", "output_hidden_states")
#: Types of arguments whose value is in the key of a call.
_PLAIN = (type(None), bool, int, float, str)


class CannotCapture(Exception):
    """Why a token cannot be captured."""


class Call(NamedTuple):
    """One call that decodes a token.

    Attributes:
        token: ids (B, 1) or embeddings (B, 1, H).
        cache: the cache that it is given.
        cache_name: the parameter that it comes in.
        mask: (B, seen tokens and this one), or None.
        tensors: name -> every other tensor among the arguments.
        plain: name -> every other argument.
        key: what calls with a graph in common agree in, but for the cache.
    """

    token: torch.Tensor
    cache: Any
    cache_name: str
    mask: torch.Tensor | None
    tensors: dict[str, torch.Tensor]
    plain: dict[str, object]
    key: tuple[object, ...]

    def arguments(self) -> dict[str, Any]:
        """All of them by name, as they were given."""
        given = {**self.plain, **self.tensors, self.cache_name: self.cache}
        return given if self.mask is None else {**given, "attention_mask": self.mask}


def read(arguments: dict[str, Any], token: torch.Tensor) -> Call:
    """A call of a forward by its arguments; raises CannotCapture for one that has no graph."""
    import torch

    if arguments.get("labels") is not None:
        raise CannotCapture("labels are given")
    cache_name = next(name for name in CACHE_NAMES if name in arguments)
    mask, tensors, plain = None, dict[str, torch.Tensor](), dict[str, object]()
    key: list[object] = [cache_name]
    for name, value in arguments.items():
        if name == cache_name:
            continue
        if name == "attention_mask" and value is not None:
            if not isinstance(value, torch.Tensor) or value.dim() != 2:
                raise CannotCapture("the attention mask is not of two dimensions")
            mask = value
            key += name, value.shape[0]
        elif isinstance(value, torch.Tensor):
            tensors[name] = value
            key += name, value.shape, value.dtype
        elif isinstance(value, _PLAIN):
            if value and name in _ASKS:
                raise CannotCapture(f"{name} is asked for")
            plain[name] = value
            key += name, value
        else:
            raise CannotCapture(f"{name} is a {type(value).__name__}")
    return Call(token, arguments[cache_name], cache_name, mask, tensors, plain, tuple(key))


def parameters_of(function: Function) -> tuple[str, ...]:
    """The names of a function's parameters, as its code has them: stars last."""
    given = function.node.args
    stars = [one for one in (given.vararg, given.kwarg) if one is not None]
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *stars]
    return tuple(one.arg for one in every)


def body_of(function: Function) -> list[ast.stmt]:
    """A function's statements without its docstring."""
    first, *rest = function.node.body
    string = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return rest if string else [first, *rest]
