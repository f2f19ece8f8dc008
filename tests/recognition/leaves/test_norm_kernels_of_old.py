"""Kernels for rms_norm that were written before the op had all its arguments."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from hf_kernel_patch import BaseKernel, registry
from hf_kernel_patch.ops.rms_norm import TorchFusedRMSNorm
from tests.support.norm_originals import EACH, Norm, inputs, patched
from tests.support.ops.inputs import F32
from tests.support.probes import fallbacks, served

pytestmark = pytest.mark.versions
every = pytest.mark.parametrize("name", EACH)


class Older(BaseKernel):
    """It knows neither groups nor norms without a weight."""

    kernel_id = "older_rms_norm"
    op = "rms_norm"

    @staticmethod
    def function(  # type: ignore[override]
        x: Any, weight: Any, eps: float, offset: float, cast_first: bool, gate: Any = None
    ) -> Any:
        assert weight is not None
        return TorchFusedRMSNorm.load()(x, weight, eps, offset, cast_first, gate)

    @classmethod
    def why_fallback(  # type: ignore[override]
        cls, x: Any, weight: Any, eps: float, offset: float, cast_first: bool, gate: Any = None
    ) -> str | None:
        return None if weight.shape == x.shape[-1:] else "another width"


class Anything(Older):
    kernel_id = "rms_norm_of_anything"

    @staticmethod
    def function(x: Any, weight: Any, *options: Any) -> Any:  # type: ignore[override]
        assert weight is not None
        return TorchFusedRMSNorm.load()(x, weight, *options[:4])

    @classmethod
    def why_fallback(cls, *arguments: Any) -> str | None:  # type: ignore[override]
        return None


NEEDS_MORE = {
    "rms_norm.nanochat": "group_size",
    "rms_norm.inkling2": "group_size",
    "rms_norm.deepseek_v4": "cast_scale",
    "rms_norm.gate_first": "norm_before_gate",
}


@every
@pytest.mark.parametrize("kernel", [Older, Anything])
def test_an_older_kernel_serves_what_it_knows(
    name: str, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.kernels(), kernel.kernel_id, kernel)
    one = EACH[name]
    norm, given = one.made(), inputs(one, F32)
    eager = norm(*given)
    needs = NEEDS_MORE.get(one.leaf, "")
    if one.given.get("with_scale") is False or one.given.get("group_size"):
        needs = needs or "group_size"
    if getattr(norm, "activation", None) and one.leaf == "rms_norm.gated":
        needs = "activation" if "weight.to" in _source(one) else needs
    with patched(one, kernel.kernel_id) as report:
        assert torch.equal(norm(*given), eager)
    if needs:
        assert f"takes no {needs}" in str(fallbacks(report))
    assert served(report) == (not needs)


def _source(one: Norm) -> str:
    return inspect.getsource(one.kind().forward)
