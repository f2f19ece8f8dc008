"""What the tests of benchmarks share: a clock, kernels that can be watched, short benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_kernel_patch import registry
from hf_kernel_patch.benchmarking.choosing import Choice
from hf_kernel_patch.benchmarking.result import Benchmark
from hf_kernel_patch.benchmarking.running import Run
from hf_kernel_patch.kernels import register_kernel
from tests.support.probes import NORM, SWIGLU
from tests.support.tiny import tokens

OWN = "watched_swiglu"
BOTH = f"{OWN},{NORM}"


class Clock:
    """Goes on by a tenth of a second each time that it is read, and by what kernels add."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        self.time += 0.1
        return self.time


class Progress:
    """Keeps what it is told; ``now`` is the variant that has its turn."""

    def __init__(self, then: Callable[[str], None] = lambda text: None) -> None:
        self.titles: list[str] = []
        self.now = "eager"
        self._then = then

    def begin(self, title: str, steps: int | None = None) -> None:
        self.titles.append(title)

    def step(self, done: int, text: str = "") -> None:
        self.now = text.rpartition(", ")[2]
        self._then(text)


@contextmanager
def swiglu_that(does: Callable[[], object]) -> Iterator[None]:
    """A kernel for swiglu that does something at each call, and then what it should."""
    right = registry.kernels()[SWIGLU]

    def function(*arguments: Any) -> torch.Tensor:
        does()
        return right.load()(*arguments)

    members = {"kernel_id": OWN, "function": staticmethod(function)}
    register_kernel(type("Watched", (right,), members))
    try:
        yield
    finally:
        del registry.kernels()[OWN]


def batch(**changes: Any) -> dict[str, torch.Tensor]:
    """Tokens with labels."""
    ids = tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **changes}


def measured(
    model: Any,
    given: dict[str, Any] | None = None,
    include: str = BOTH,
    models: str = "llama",
    told: Any = None,
    **choice: Any,
) -> Benchmark:
    """A benchmark of two rounds and two tokens, by a clock that nothing but kernels slows down."""
    chosen = {"rounds": 2, "decode": 2, "now": Clock(), **choice}
    arguments = {"include": include, "models": models, "strict": False}
    run = Run(model, given or batch(), Choice(arguments, **chosen), told or Progress())
    return run.result()
