"""Experts that the user chose in transformers' own way stay: the report says so."""

from __future__ import annotations

import warnings

import pytest

import hf_kernel_patch
from tests.support.probes import MOE
from tests.support.tiny import TRANSFORMERS_5, tiny_model


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no choice of experts")
@pytest.mark.parametrize("asked", ["batched_mm", "eager", "grouped_mm"])
@pytest.mark.parametrize("include", ["auto", MOE])
def test_one_model_reports_the_implementation_that_was_asked_for(asked: str, include: str) -> None:
    model = tiny_model("qwen3_moe", experts_implementation=asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_kernel_patch.apply_default_kernels(model, include)
    (row,) = [r for r in hf_kernel_patch.status() if r.site.endswith("Qwen3MoeExperts.forward")]
    left = include == "auto" and asked != "grouped_mm"
    assert (f"experts_implementation={asked!r} was asked for" in row.reason) == left
    assert row.outcome == "patched"
    hf_kernel_patch.unpatch(model)
