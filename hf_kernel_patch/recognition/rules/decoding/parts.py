"""What has to stay as it is in a model for what was captured of it to be valid."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.modules import hooked
from hf_kernel_patch.recognition.rules.decoding.attention import Entry, true_value
from hf_kernel_patch.recognition.source import made_by_us
from hf_kernel_patch.recognition.wrappers import innermost_of

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Packages whose modules may be captured: their code has no effect but its result.
HOMES = ("torch.nn.", "transformers.", "peft.")
#: Of a model itself these may be what they like: they are outside of its forward.
_OUTSIDE = {"forward", *(f"_{one}" for one in ("forward_hooks", "forward_pre_hooks"))}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Parts:
    """Modules, weights, code and settings of a model, as they were when this was made.

    ``entries`` are functions that its code looks up in registries.
    """

    def __init__(self, model: nn.Module, entries: Sequence[Entry]):
        modules = list(model.modules())[1:]  # the model's own hooks run whether captured or not
        self.modules = modules
        self._types = list(map(type, modules))
        self._touched = list(map(_touched, modules))
        self._states = [vars(module) for module in modules]
        self._settled = list(map(_settled, self._states))
        self._hooks = [state[name] for state in self._states for name in _HOOKS]
        own = {name: value for name, value in vars(model).items() if name not in _OUTSIDE}
        self._own = vars(model), _settled(own)
        every = [vars(model), *self._states]
        held = [state[kind] for state in every for kind in ("_parameters", "_buffers")]
        names = [(mapping, n) for mapping in held for n, one in mapping.items() if one is not None]
        self.tensors = [mapping[name] for mapping, name in names]
        self._plain = [tensor for tensor in self.tensors if _is_plain(tensor)]
        self._pointers = [tensor.data_ptr() for tensor in self._plain]
        #: Of these, another one might be equal; larger ones cannot be compared by their values.
        self._single = [(m, n, m[n]) for m, n in names if m[n].numel() == 1]
        self._classes = list({type(module): None for module in [model, *modules]})
        self._forwards = [(cls, cls.forward) for cls in self._classes]
        held_configs = (state.get("config") for state in every)
        configs = {id(c): vars(c) for c in held_configs if hasattr(c, "__dict__")}
        self._configs = [(config, _settled(config)) for config in configs.values()]
        self._looked_up = [*_code_of(self._classes), *entries]

    def in_place(self) -> bool:
        """Whether every weight that was captured is where it was.

        It is asked before a graph is replayed, which reads from there; all else may be asked while
        it runs.
        """
        return [tensor.data_ptr() for tensor in self._plain] == self._pointers

    def unchanged(self) -> bool:
        """Whether modules, hooks, weights, code and settings are what they were.

        Dictionaries are compared as wholes: values that are the same objects cost next to nothing.
        """
        own, settled = self._own
        try:
            return (
                self._states == self._settled
                and list(map(type, self.modules)) == self._types
                and (not any(map(len, self._hooks)) or self._as_touched())
                and all(m.get(name) is tensor for m, name, tensor in self._single)
                and all(cls.forward is forward for cls, forward in self._forwards)
                and {name: own.get(name) for name in settled} == settled
                and all(config == then for config, then in self._configs)
                and all(
                    true_value(scope.get(name)) is value for scope, name, value in self._looked_up
                )
            )
        except Exception:  # as where another tensor has taken a weight's place
            return False

    def _as_touched(self) -> bool:
        """Whether hooks of single modules are what they were."""
        return list(map(_touched, self.modules)) == self._touched

    def why_not(self, device: torch.device) -> str | None:
        """Why a model of these parts cannot be captured for tokens on a device."""
        for module, touched in zip(self.modules, self._touched):
            cls = type(module)
            if not cls.__module__.startswith(HOMES):
                return f"{cls.__qualname__} of {cls.__module__} is no part of transformers"
            if touched:
                return f"a hook on {cls.__qualname__} needs the original"
            if module.training:
                return f"{cls.__qualname__} is in training mode"
        for tensor in self.tensors:
            if not _is_plain(tensor):
                return f"a weight is a {type(tensor).__name__}"
            if tensor.device != device:
                return "its weights are on several devices"
        return None


def _settled(state: Mapping[str, Any]) -> dict[str, Any]:
    """The values of now, of containers copies: these may change in place.

    Hooks are looked at apart; here they stay the very mappings.
    """
    return {
        name: type(value)(value) if type(value) in _CONTAINERS else value
        for name, value in state.items()
    }


_CONTAINERS = (list, dict, set)


def _is_plain(tensor: torch.Tensor) -> bool:
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _touched(module: nn.Module) -> bool:
    """As ``hooked``, but for the hooks by which transformers collects outputs when asked to."""
    if not hooked(module):
        return False
    hooks = module._forward_hooks.values()
    if not hooks or any("output_capturing" not in str(hook.__module__) for hook in hooks):
        return True
    return "forward" in vars(module) or bool(module._forward_pre_hooks or module._backward_hooks)


def collecting() -> bool:
    """Whether transformers collects outputs from inside of layers, by hooks, in this call."""
    module = sys.modules.get("transformers.utils.output_capturing")
    collected = None if module is None else module._active_collector.get()
    return any(key != "hidden_states" and key[0] != "_" for key in collected or ())


def _code_of(classes: Iterable[type]) -> Iterator[Entry]:
    """Every function of models that the forwards of classes run by name, where they find it."""
    waiting: list[tuple[type | None, Any]] = [
        (cls, getattr(cls, "forward", None)) for cls in classes
    ]
    seen: set[tuple[int, str]] = set()
    done: set[tuple[type | None, int]] = set()
    while waiting:
        cls, value = waiting.pop()
        if (made := made_by_us(value)) is not None:
            waiting.append((cls, made.original))
        function = innermost_of(value)
        if not isinstance(function, FunctionType) or (cls, id(function)) in done:
            continue
        done.add((cls, id(function)))
        scope = function.__globals__
        if not str(scope.get("__name__")).startswith("transformers.models."):
            continue
        names = _names(function.__code__)
        for owner, key, held in ((None, id(scope), scope), *_mro(cls)):
            for name in names.intersection(held):
                if (key, name) not in seen:
                    seen.add((key, name))
                    yield held, name, true_value(held[name])
                    waiting.append((owner, held[name]))


def _mro(cls: type | None) -> list[tuple[type | None, int, Any]]:
    """The classes of transformers' models that a class is made of, and what they hold."""
    every = () if cls is None else cls.__mro__
    own = (one for one in every if one.__module__.startswith("transformers.models."))
    return [(cls, id(one), vars(one)) for one in own]


def _names(code: CodeType) -> set[str]:
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*map(_names, inner))
