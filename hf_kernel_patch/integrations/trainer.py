"""A callback for the Trainer of transformers, imported when somebody asks for it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

# Not of transformers itself, a lazy module that fails while another thread imports it.
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from hf_kernel_patch import settings
from hf_kernel_patch.api import apply_default_kernels
from hf_kernel_patch.errors import listed, raise_if_blocked, shown, warn
from hf_kernel_patch.integrations.training_log import TrainingLog, with_metrics
from hf_kernel_patch.kernels import Kernel
from hf_kernel_patch.patching import model_patch
from hf_kernel_patch.patching.choosing import auto_unless_said, choose
from hf_kernel_patch.patching.report import Outcome, PatchReport, Row
from hf_kernel_patch.settings import UNSET

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("hf_kernel_patch")


class KernelPatchCallback(TrainerCallback):
    """Patches the Trainer's model, and no other, until its training has ended.

    Given to the Trainer when it is made, it patches then, before accelerate wraps the model's
    forward. What else is patched on the model stays. Where training ends in an exception,
    ``unpatch(model)`` gives it back. What is patched is chosen as for ``apply_default_kernels``,
    and a wrong name raises here.

    Args:
        report: add to each entry of the Trainer's log, and so to TensorBoard and the like, the
            calls that kernels served and the fallbacks in the steps since the last entry
            (``kernel_calls_served``, ``kernel_calls_fallback``), and where the fused loss is used
            ``token_accuracy`` and ``mean_entropy``, as means over the steps of this process. The
            whole report is logged at the end, too. It costs the counting of calls, and the
            metrics of the loss unless ``options`` switch them off.
    """

    def __init__(
        self,
        include: settings.Include = UNSET,
        *,
        exclude: settings.Names | None = UNSET,
        options: settings.Options = UNSET,
        config: settings.Config = None,
        report: bool = False,
    ) -> None:
        if not isinstance(report, bool):
            raise TypeError(f"report is True or False, not {shown(report)}")
        include = auto_unless_said(include, config)
        given: dict[str, Any] = {"exclude": exclude, "options": options, "config": config}
        wanted, kernels = choose(
            config, include=include, exclude=exclude, options=options
        )  # or raise
        if report:
            given["options"] = _measuring(wanted, kernels)
        self._arguments: dict[str, Any] = {"include_kernels": include, **given}
        self._applied: list[model_patch.Application] = []
        self._told: list[str] = []  # sites whose forward something stands in front of
        self._rows: list[Row] = []
        self._log = TrainingLog() if report else None

    @property
    def report(self) -> PatchReport:
        """What was patched of the model, also after the training, with the calls if counted."""
        return PatchReport(self._rows, "" if self._rows else "no model was patched")

    def __getstate__(self) -> dict[str, Any]:
        # A copy has patched nothing, and nothing is its to take back.
        log = None if self._log is None else TrainingLog()
        return {**vars(self), "_applied": [], "_rows": [], "_log": log}

    def on_init_end(self, *_: object, model: nn.Module | None = None, **__: object) -> None:
        if self._log is not None:
            _put_first(self)
        if model is not None:
            self._apply(model)

    def on_train_begin(self, *_: object, model: nn.Module | None = None, **__: object) -> None:
        self._apply(model)
        self._warn_of_what_came_in_front()
        if self._log is not None and model is not None:
            _put_first(self)
            self._log.begin(model, self._in_force)

    def on_step_begin(self, *_: object, **__: object) -> None:
        if self._log is not None:
            self._log.step_begins(self._rows)

    def on_step_end(self, *_: object, **__: object) -> None:
        if self._log is not None:
            self._log.step_ends(self._rows)

    def on_log(
        self,
        args: object,
        state: Any,
        control: object,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        if self._log is None or not logs or "loss" not in logs:  # of an evaluation, or of the end
            return
        found = self._log.since_last_time()
        new = {name: value for name, value in found.items() if name not in logs}
        logs.update(new)
        # The Trainer's history has a copy of what it logs.
        kept = state.log_history[-1] if state.log_history else {}
        if kept.get("step") == state.global_step and kept.get("loss") == logs["loss"]:
            kept.update(new)

    def on_train_end(self, *_: object, **__: object) -> None:
        if self._log is not None:
            self._log.end()
            if settings.is_rank_zero():
                logger.info("the training has ended: %s", self.report)
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
        self._rows += rows
        self._told += [row.site for row in rows if row.outcome == Outcome.SHADOWED]

    def _in_force(self) -> bool:
        return any(one in model_patch.applications for one in self._applied)

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


def _measuring(wanted: settings.Settings, kernels: Mapping[str, Kernel]) -> settings.Options:
    """The options that were given, with the metrics of the loss where its kernel has them."""
    loss = kernels.get("linear_cross_entropy")
    owners = (loss.op, loss.kernel_id) if loss and "metrics" in loss.options else ()
    return with_metrics(wanted.options, owners)


def _put_first(callback: TrainerCallback) -> None:
    """Let a callback be called before those that write the log, such as TensorBoard's.

    What it adds to an entry is only seen by those that come later, and the Trainer puts those of
    users last. It names its list of callbacks to nobody, but calls them from it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler) and callback in owner.callbacks:
            owner.callbacks.remove(callback)
            owner.callbacks.insert(0, callback)
            return
        frame = frame.f_back  # type: ignore[assignment]


KernelPatchCallback.__module__ = "hf_kernel_patch"  # by which pickles find it
