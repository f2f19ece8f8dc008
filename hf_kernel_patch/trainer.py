"""A callback for the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from hf_kernel_patch import settings
from hf_kernel_patch.api import apply_default_kernels
from hf_kernel_patch.patching import model_patch
from hf_kernel_patch.patching.global_patch import raise_if_blocked
from hf_kernel_patch.settings import UNSET

_made: dict[str, type] = {}


def callback_class() -> type:
    """``KernelPatchCallback``, which needs transformers to be made."""
    # Threads may make it at the same time; all get the one that is kept.
    return _made.get("class") or _made.setdefault("class", _make())


def _make() -> type:
    # Not of transformers itself, a lazy module that fails while another thread imports it.
    from transformers.trainer_callback import TrainerCallback

    class KernelPatchCallback(TrainerCallback):
        """Patches the Trainer's model, and no other, until its training has ended.

        Takes what ``apply_default_kernels`` takes. Given to the Trainer when it is made, it
        patches then, before accelerate wraps the model's forward. What else is patched on the
        model stays. Where training ends in an exception, ``unpatch(model)`` gives it back.
        """

        def __init__(
            self, include: Any = UNSET, *, options: Any = UNSET, config: Any = None
        ) -> None:
            settings.resolve(config, include=include, options=options)  # a mistake is told now
            self._arguments = {"include_kernels": include, "options": options, "config": config}
            self._applied: list[model_patch.Application] = []

        def __getstate__(self) -> dict[str, Any]:
            # A copy has patched nothing, and nothing is its to take back.
            return {**vars(self), "_applied": []}

        def on_init_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            if model is not None:
                self._apply(model)

        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            self._apply(model)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            applied, self._applied = self._applied, []
            raise_if_blocked([place for one in reversed(applied) for place in one.release()])

        def _apply(self, model: Any) -> None:
            mine = {id(module) for module in model.modules()}
            held = (module for one in self._applied for module in one.holds())
            if any(id(module) in mine for module in held):
                return
            before = list(model_patch.applications)
            apply_default_kernels(model, **self._arguments)
            self._applied += [one for one in model_patch.applications if one not in before]

    KernelPatchCallback.__module__ = "hf_kernel_patch"
    KernelPatchCallback.__qualname__ = "KernelPatchCallback"
    return KernelPatchCallback
