"""A callback for the Trainer of transformers, imported when somebody asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Not of transformers itself, a lazy module that fails while another thread imports it.
from transformers.trainer_callback import TrainerCallback

from hf_kernel_patch import settings
from hf_kernel_patch.api import apply_default_kernels
from hf_kernel_patch.errors import listed, raise_if_blocked, warn
from hf_kernel_patch.patching import model_patch
from hf_kernel_patch.patching.choosing import choose
from hf_kernel_patch.patching.report import Outcome
from hf_kernel_patch.settings import UNSET

if TYPE_CHECKING:
    from torch import nn


class KernelPatchCallback(TrainerCallback):
    """Patches the Trainer's model, and no other, until its training has ended.

    Takes what ``apply_default_kernels`` takes. Given to the Trainer when it is made, it
    patches then, before accelerate wraps the model's forward. What else is patched on the
    model stays. Where training ends in an exception, ``unpatch(model)`` gives it back.
    """

    def __init__(
        self,
        include: settings.Include = UNSET,
        *,
        options: settings.Options = UNSET,
        config: settings.Config = None,
    ) -> None:
        by_default = "auto" if include is UNSET and config is None else include
        choose(config, include=by_default, options=options)  # a mistake is told now
        self._arguments: dict[str, Any] = {
            "include_kernels": include,
            "options": options,
            "config": config,
        }
        self._applied: list[model_patch.Application] = []
        self._told: list[str] = []  # sites whose forward something stands in front of

    def __getstate__(self) -> dict[str, Any]:
        # A copy has patched nothing, and nothing is its to take back.
        return {**vars(self), "_applied": []}

    def on_init_end(self, *_: object, model: nn.Module | None = None, **__: object) -> None:
        if model is not None:
            self._apply(model)

    def on_train_begin(self, *_: object, model: nn.Module | None = None, **__: object) -> None:
        self._apply(model)
        self._warn_of_what_came_in_front()

    def on_train_end(self, *_: object, **__: object) -> None:
        applied, self._applied = self._applied, []
        raise_if_blocked([place for one in reversed(applied) for place in one.release()])

    def _apply(self, model: nn.Module) -> None:
        mine = {id(module) for module in model.modules()}
        held = (module for one in self._applied for module in one.holds())
        if any(id(module) in mine for module in held):
            return
        before = list(model_patch.applications)
        apply_default_kernels(model, **self._arguments)
        new = [one for one in model_patch.applications if one not in before]
        self._applied += new
        # What was in front then was told when it was patched.
        rows = [row for one in new for row in one.rows.values()]
        self._told += [row.site for row in rows if row.outcome == Outcome.SHADOWED]

    def _warn_of_what_came_in_front(self) -> None:
        """A trainer may set forwards of its own after ``on_init_end``, as those of TRL do."""
        for one in self._applied:
            one.look()
        rows = [row for one in self._applied for row in one.rows.values()]
        hidden = [
            row for row in rows if row.outcome == Outcome.SHADOWED and row.site not in self._told
        ]
        self._told += [row.site for row in rows if row.outcome == Outcome.SHADOWED]
        if hidden:
            told = listed([f"{row.site} is not served: {row.reason}" for row in hidden], "\n")
            warn(told)


KernelPatchCallback.__module__ = "hf_kernel_patch"  # by which pickles find it
