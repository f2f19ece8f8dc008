"""What has to stay as it is inside of a layer for its graphs to be valid."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING

from hf_kernel_patch.recognition.modules import hooked
from hf_kernel_patch.recognition.rules.decoding.program import HOMES, Globals

if TYPE_CHECKING:
    import torch
    from torch import nn


class Parts:
    """The modules and weights inside of a layer, as they were when it was made.

    ``scope`` are the globals that its code uses.
    """

    def __init__(self, layer: nn.Module, scope: Sequence[Globals] = ()):
        modules = list(layer.modules())[1:]  # the layer's own hooks run whether captured or not
        self.modules = modules
        self._child_names = [(m._modules, name) for m in [layer, *modules] for name in m._modules]
        self._children = [children[name] for children, name in self._child_names]
        self._classes = [type(module) for module in modules]
        self._forwards = [cls.forward for cls in self._classes]
        self._training = [module.training for module in modules]
        self._touched = list(map(_touched, modules))
        self._states = [vars(module) for module in modules]
        tensors = [mapping for m in modules for mapping in (m._parameters, m._buffers)]
        self._tensor_names = [
            (mapping, n) for mapping in tensors for n, value in mapping.items() if value is not None
        ]
        self.tensors = [mapping[name] for mapping, name in self._tensor_names]
        # A subclass, such as a quantised weight, may have no memory of its own.
        self._plain = [tensor for tensor in self.tensors if _is_plain(tensor)]
        self._pointers = [tensor.data_ptr() for tensor in self._plain]
        self._scope = scope
        self._globals = [mapping.get(name) for mapping, name in scope]

    def unchanged(self) -> bool:
        """Whether every module, its class's forward and every weight's memory is what it was."""
        return (
            self._as_touched()
            and all(map(is_, [mapping.get(n) for mapping, n in self._child_names], self._children))
            and all(map(is_, map(type, self.modules), self._classes))
            and all(map(is_, [cls.forward for cls in self._classes], self._forwards))
            and [state["training"] for state in self._states] == self._training
            and all(map(is_, [mapping.get(n) for mapping, n in self._tensor_names], self.tensors))
            and [tensor.data_ptr() for tensor in self._plain] == self._pointers
            and all(map(is_, [mapping.get(n) for mapping, n in self._scope], self._globals))
        )

    def _as_touched(self) -> bool:
        """Whether hooks and forwards of single modules are what they were."""
        for state in self._states:  # the cheap question first: most modules have none
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
                or "forward" in state
            ):
                return list(map(_touched, self.modules)) == self._touched
        return True not in self._touched

    def why_not(self) -> str | None:
        """Why a layer of these parts cannot be captured."""
        for module, cls in zip(self.modules, self._classes):
            if not cls.__module__.startswith(HOMES):
                return f"{cls.__qualname__} of {cls.__module__} is no part of transformers"
            if _touched(module):
                return f"a hook on {cls.__qualname__} needs the original"
        for tensor in self.tensors:
            if not _is_plain(tensor):
                return f"a weight is a {type(tensor).__name__}"
        return None


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
