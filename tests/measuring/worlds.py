"""Kernels that take as long as a test says, by a clock of its own, and real models that train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import optimizer as optimizers

from hf_kernel_patch import registry
from hf_kernel_patch.kernels import BaseKernel, register_kernel
from hf_kernel_patch.ops.rms_norm import TorchFusedRMSNorm
from hf_kernel_patch.ops.rope import TorchFusedRoPE
from tests.support.tiny import tokens

KERNELS = {"rms_norm": TorchFusedRMSNorm, "rope": TorchFusedRoPE}


class Clock:
    """Goes on when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        """So much time goes by, or comes back."""
        self.now += seconds


@contextmanager
def kernels(clock: Clock | None = None, **costs: float) -> Iterator[None]:
    """Op -> what a call of its kernel takes: this machine's "auto" has these kernels.

    By a clock, or in truth.
    """
    spend = time.sleep if clock is None else clock.spend
    made = [_kernel(KERNELS[op], spend, cost) for op, cost in costs.items()]
    for one in made:
        register_kernel(one)
    try:
        yield
    finally:
        for one in made:
            del registry.kernels()[one.kernel_id]


def _kernel(
    base: type[BaseKernel], spend: Callable[[float], None], cost: float
) -> type[BaseKernel]:
    real = base.load()

    def function(*arguments: Any) -> Any:
        spend(cost)
        return real(*arguments)

    members = {"kernel_id": f"timed_{base.op}", "device": "cpu", "function": staticmethod(function)}
    return type("Timed", (base,), members)


class Training:
    """A model, its optimizer, and one step of both, which takes a second and what kernels add."""

    def __init__(self, model: Any, clock: Clock, optimizer: Any = None):
        self.model, self.clock = model.train(), clock
        self.optimizer = optimizer or torch.optim.SGD(model.parameters(), 1e-3)

    def step(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        ids = tokens() if ids is None else ids
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        self.clock.now += ids.numel() / tokens().numel()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def measured(report: Any) -> dict[str, str]:
    """Op -> what its rows say."""
    return {row.op: row.measured for row in report.patched}


def is_chosen(report: Any) -> bool:
    """Whether all rows say what was chosen."""
    texts = measured(report).values()
    return all("; measured now" in text or "from /" in text for text in texts) and not any(
        "timed" in text for text in texts
    )


def steps_until_chosen(step: Any, report: Any, most: int = 400) -> int:
    """How many steps it takes."""
    for number in range(most):
        if report.patched and is_chosen(report):
            return number
        step()
    raise AssertionError(f"nothing is chosen after {most} steps: {measured(report)}")


def hooks_left() -> int:
    """Hooks of all optimizers that torch knows."""
    return len(optimizers._global_optimizer_post_hooks)
