"""Which model, and in which mode, a call belongs to."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import ref

from hf_kernel_patch.measuring import models
from hf_kernel_patch.measuring.run import Run

if TYPE_CHECKING:
    from torch import nn

#: A model's runs: training, inference; (None, None) of a module outside of any model.
Runs = tuple[Run, Run] | tuple[None, None]

#: Looks for a module's model, each of which takes a moment, that may end without one.
MOST_IN_VAIN = 16


class Owners:
    """The runs of every module that was seen, none of which it keeps alive.

    ``out`` is what is left to the original, op -> reason, until a run has an answer of its own.
    """

    def __init__(self, out: Mapping[str, str]):
        self._out = out
        self._lock = threading.RLock()
        self.thread = threading.local()
        self.runs_of: dict[int, Runs] = {}
        self._in_vain = 0
        self._references: dict[int, ref[Any]] = {}
        #: torch's own answer whether gradients are wanted, from the first look on.
        self.gradients: Callable[[], bool] = bool

    def run_of(self, module: nn.Module) -> Run | None:
        """The run of a module's call."""
        runs = self.runs_of.get(id(module)) or self.find(module)
        run = self.thread.run = runs[0 if module.training or self.gradients() else 1]
        return run

    def last(self) -> Run | None:
        """The run that this thread's last call belongs to."""
        return getattr(self.thread, "run", None)

    def forget(self) -> None:
        """Nothing more is asked."""
        with self._lock:
            self.runs_of.clear()
            self._references.clear()

    def find(self, module: nn.Module) -> Runs:
        """The runs of the model that a module belongs to."""
        from torch import is_grad_enabled

        self.gradients = is_grad_enabled
        if getattr(module, "_is_replica", False):  # of DataParallel, which lives for one call
            return None, None
        with self._lock:
            model = models.root_with(module) if self._in_vain < MOST_IN_VAIN else None
            if model is None:
                self._in_vain += 1
                runs: Runs = None, None
                parts = [module]
            else:
                parts = list(model.modules())
                known = (self.runs_of.get(id(part)) for part in parts)
                alive = (one for one in known if one and one[0] and one[0].model() is model)
                runs = next(alive, None) or self._new(model)
            for part in parts:
                self._remember(part, runs)
            return runs

    def _new(self, model: Any) -> Runs:
        runs = Run(model, True, self._out), Run(model, False, self._out)
        runs[0].other, runs[1].other = runs[1], runs[0]
        return runs

    def _remember(self, module: nn.Module, runs: Runs) -> None:
        key, known, references = id(module), self.runs_of, self._references

        def forget(_: object) -> None:
            known.pop(key, None)
            references.pop(key, None)

        known[key], references[key] = runs, ref(module, forget)


def caller(depth: int) -> nn.Module | None:
    """The module that has called a function, so many frames from here or more; None for none."""
    kind: type[nn.Module] = sys.modules["torch.nn"].Module
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            module = frame.f_locals.get("self")
            if isinstance(module, kind):
                return module
        frame = frame.f_back
    return None
