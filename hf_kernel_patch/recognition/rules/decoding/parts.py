"""What has to stay as it is inside of a layer for its graphs to be valid."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import is_
from typing import Any

from hf_kernel_patch.recognition.modules import hooked
from hf_kernel_patch.recognition.rules.decoding.program import HOMES


class Parts:
    """The modules and weights inside of a layer, as they were.

    ``scope`` are globals that its code uses: (globals, name).
    """

    def __init__(self, layer: Any, scope: Sequence[tuple[dict[str, Any], str]] = ()):
        modules = list(layer.modules())[1:]  # the layer's own hooks run whether captured or not
        self.modules = modules
        self._slots = [(m._modules, name) for m in [layer, *modules] for name in m._modules]
        self._children = [mapping[name] for mapping, name in self._slots]
        self._kinds = [type(module) for module in modules]
        self._forwards = [kind.forward for kind in self._kinds]
        self._training = [module.training for module in modules]
        self._touched = list(map(_touched, modules))
        self._states = [vars(module) for module in modules]
        held = [kept for m in modules for kept in (m._parameters, m._buffers)]
        self._places = [
            (kept, n) for kept in held for n, value in kept.items() if value is not None
        ]
        self.tensors = [kept[name] for kept, name in self._places]
        # A subclass, such as a quantised weight, may have no memory of its own.
        self._plain = [tensor for tensor in self.tensors if _is_plain(tensor)]
        self._pointers = [tensor.data_ptr() for tensor in self._plain]
        self._scope = scope
        self._globals = [mapping.get(name) for mapping, name in scope]

    def unchanged(self) -> bool:
        """Whether every module, its class's forward and every weight's memory is what it was."""
        return (
            self._as_touched()
            and all(map(is_, [mapping.get(n) for mapping, n in self._slots], self._children))
            and all(map(is_, map(type, self.modules), self._kinds))
            and all(map(is_, [kind.forward for kind in self._kinds], self._forwards))
            and [state["training"] for state in self._states] == self._training
            and all(map(is_, [kept.get(name) for kept, name in self._places], self.tensors))
            and [tensor.data_ptr() for tensor in self._plain] == self._pointers
            and all(map(is_, [mapping.get(n) for mapping, n in self._scope], self._globals))
        )

    def _as_touched(self) -> bool:
        for state in self._states:  # at first what costs least: nobody has touched anything
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
        for module, kind in zip(self.modules, self._kinds):
            if not kind.__module__.startswith(HOMES):
                return f"{kind.__qualname__} of {kind.__module__} is no part of transformers"
            if _touched(module):
                return f"a hook on {kind.__qualname__} needs the original"
        for tensor in self.tensors:
            if not _is_plain(tensor):
                return f"a weight is a {type(tensor).__name__}"
        return None


def _is_plain(tensor: Any) -> bool:
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _touched(module: Any) -> bool:
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
