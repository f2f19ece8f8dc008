"""A kernel that is wrong on purpose shows wherever it is counted as served, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.kernels import register_kernel
from tests.support.probes import served
from tests.support.scope import build
from tests.support.tiny import having, largest_error, outputs_and_gradients

OPS = (
    "rms_norm",
    "rope",
    "swiglu",
    "moe",
    "add_rms_norm",
    "qk_norm_rope",
    "linear_cross_entropy",
)
#: Rounding makes a difference of 3e-6 at most.
SEEN = 1e-4
CASES = [(name, op) for op in OPS for name in having(op)]


def scaled(result: Any) -> Any:
    """A result times 1.01, and each of several."""
    if isinstance(result, tuple):
        made = [scaled(one) for one in result]
        return type(result)(*made) if hasattr(result, "_fields") else tuple(made)
    if isinstance(result, torch.Tensor) and result.is_floating_point():
        return result * 1.01
    return result


class Wrong:
    """The plain kernel of an op under an id of its own, wrong in one of its calls, or in all."""

    def __init__(self, op: str):
        self.kernel_id, self.calls = f"wrong_{op}", 0
        self.only: int | None = None
        self._right = registry.kernels()[PLAIN[op]].load()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        result = self._right(*arguments, **options)
        self.calls += 1
        return scaled(result) if self.only in (None, self.calls - 1) else result


@contextmanager
def wrong(op: str) -> Iterator[Wrong]:
    made = Wrong(op)
    members = {"kernel_id": made.kernel_id, "default_on": (), "function": made}
    register_kernel(type("Own", (registry.kernels()[PLAIN[op]],), members))
    try:
        yield made
    finally:
        del registry.kernels()[made.kernel_id]


PLAIN = {
    kernel.op: name
    for name, kernel in registry.kernels().items()
    if kernel.backend == "torch" and kernel.op in OPS
}


@cache
def right(name: str) -> dict[str, torch.Tensor]:
    """What the original gives; to be asked for while nothing is patched."""
    return outputs_and_gradients(build(name).train())


@pytest.mark.parametrize(("name", "op"), CASES)
def test_it_changes_the_loss_or_a_gradient(name: str, op: str) -> None:
    """Each of the calls does that are counted as served, by itself."""
    model, truth = build(name).train(), right(name)
    with (
        wrong(op) as kernel,
        hf_kernel_patch.patched(kernel.kernel_id, models=name, strict=True) as report,
    ):
        assert largest_error(outputs_and_gradients(model), truth) > SEEN
        assert served(report) == kernel.calls > 0
        for call in range(kernel.calls):
            kernel.calls, kernel.only = 0, call
            found = outputs_and_gradients(model)
            assert largest_error(found, truth) > SEEN, f"call {call}"


@pytest.mark.parametrize("scope", ["all models", "one model"])
@pytest.mark.parametrize(("name", "op"), CASES)
def test_it_changes_nothing_where_it_serves_nothing(
    name: str, op: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, truth = build(name).train(), right(name)
    with wrong(op) as made:
        kernel = made.kernel_id
        why_fallback = staticmethod(lambda *arguments: "it never serves")
        monkeypatch.setattr(registry.kernels()[kernel], "why_fallback", why_fallback)
        if scope == "one model":
            hf_kernel_patch.apply_kernel(kernel, model=model)
        else:
            hf_kernel_patch.patch_transformers(kernel, models=name, strict=True)
        report = hf_kernel_patch.status()
        found = outputs_and_gradients(model)
        hf_kernel_patch.unpatch()
    assert made.calls == served(report) == 0
    assert any("it never serves" in row.fallbacks for row in report)
    assert largest_error(found, truth) == 0
