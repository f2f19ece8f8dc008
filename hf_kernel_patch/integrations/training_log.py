"""What a patched training reports of itself: calls, and the metrics of its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_kernel_patch.api import count_calls
from hf_kernel_patch.patching.report import Row
from hf_kernel_patch.recognition import site as sites

if TYPE_CHECKING:
    from torch import nn

#: Fields that the output of a training step has with the option ``metrics`` of the fused loss.
METRICS = ("token_accuracy", "mean_entropy")


class TrainingLog:
    """Counts the calls of patched sites, and gathers metrics from a model's outputs."""

    def __init__(self) -> None:
        self._hook: Any = None
        self._in_force: Callable[[], bool] | None = None
        self._counted_before = False
        #: Calls served and fallbacks: when this step began, and in the steps since the last time.
        self._before: tuple[int, ...] = (0, 0)
        self._calls: tuple[int, ...] = (0, 0)
        #: Metric -> (sum, number of outputs) since it was last asked for.
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}

    def begin(self, model: nn.Module, in_force: Callable[[], bool]) -> None:
        """Watch a model as long as its patch is in force; if another is watched, no longer that."""
        self.end()
        self._in_force = in_force
        self._counted_before = sites.counting
        count_calls()
        # torch.compile is not to trace a hook that keeps what it sees.
        self._hook = model.register_forward_hook(torch.compiler.disable(self._see))

    def end(self) -> None:
        """Watch no longer, and count calls only if they were counted before."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            count_calls(self._counted_before)

    def step_begins(self, rows: Iterable[Row]) -> None:
        """A training step begins; calls between steps, as of evaluations, are not counted."""
        self._before = _calls(rows)

    def step_ends(self, rows: Iterable[Row]) -> None:
        """A training step has ended."""
        self._calls = tuple(
            sum(each) - before
            for *each, before in zip(self._calls, _calls(rows), self._before, strict=True)
        )

    def since_last_time(self) -> dict[str, float]:
        """Calls in training steps, and the mean of each metric, since it was last asked for."""
        served, fallbacks = self._calls
        found: dict[str, float] = {
            "kernel_calls_served": served,
            "kernel_calls_fallback": fallbacks,
        }
        for name, (total, number) in self._sums.items():
            value = float(total) / number  # here alone it waits for the device
            if math.isfinite(value):
                found[name] = value
        self._calls, self._sums = (0, 0), {}
        return found

    def _see(self, model: nn.Module, arguments: object, output: object) -> None:
        """A forward hook. It reads no logits, which may wait."""
        if self._in_force is None or not self._in_force():
            # The training has ended in an exception, which nobody told us.
            self.end()
            return
        if not model.training or not torch.is_grad_enabled():
            return
        for name in METRICS:
            held = output.get(name) if type(output) is dict else getattr(output, name, None)
            if isinstance(held, torch.Tensor):
                total, number = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + held.detach().float(), number + 1


def _calls(rows: Iterable[Row]) -> tuple[int, int]:
    every = list(rows)
    return sum(row.served for row in every), sum(sum(row.fallbacks.values()) for row in every)


def with_metrics(
    options: Iterable[tuple[str, str, object]], owners: tuple[str, ...]
) -> Mapping[str, Mapping[str, object]]:
    """Options of kernels with the metrics of the loss switched on, unless they name these.

    ``owners`` are the names that stand for the loss: its op and its kernel.
    """
    found: dict[str, dict[str, object]] = {}
    for owner, option, value in options:
        found.setdefault(owner, {})[option] = value
    if owners and not any("metrics" in found.get(owner, {}) for owner in owners):
        found.setdefault(owners[0], {})["metrics"] = True
    return found
