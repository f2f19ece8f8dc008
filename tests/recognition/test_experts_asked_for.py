"""Code that no kernel serves, and experts that the user chose: the report says so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import hf_kernel_patch
from hf_kernel_patch import Architecture, KernelPatchWarning, Leaf, register_code, register_model
from hf_kernel_patch.models import architectures
from hf_kernel_patch.recognition import known
from tests.probes import MOE, SWIGLU
from tests.tiny import TRANSFORMERS_5, modelling, tiny_model

WHY = "no kernel computes such a layer"


@pytest.fixture
def unserved() -> Iterator[str]:
    """A table that names a leaf which no kernel serves."""
    register_code(Leaf("swiglu.unserved", "swiglu", {}, unserved=WHY))
    module = architectures()["llama"].module
    register_model(
        Architecture("unserved", {"LlamaDecoderLayer.forward": "swiglu.unserved"}, module=module)
    )
    yield "unserved"
    del architectures()["unserved"]
    del known()["swiglu.unserved"]


def layer_row(report: Any) -> tuple[str, str, str]:
    """Architecture, outcome and reason of the row of the unserved leaf."""
    (row,) = [row for row in report if row.site.endswith("LlamaDecoderLayer.forward")]
    return row.architecture, row.outcome, row.reason


def test_a_global_patch_reports_it_and_does_not_complain(unserved: str) -> None:
    forward = modelling("llama").LlamaDecoderLayer.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hf_kernel_patch.patched(SWIGLU, models=("llama", unserved), strict=True) as report:
            assert layer_row(report) == (unserved, "skipped", WHY)
            assert modelling("llama").LlamaDecoderLayer.forward is forward


def test_a_kernel_that_was_asked_for_by_name_found_no_site_there(unserved: str) -> None:
    modelling("llama")
    with pytest.warns(KernelPatchWarning, match="found no site in unserved"):
        hf_kernel_patch.patch_transformers(SWIGLU, models=unserved)
    assert layer_row(hf_kernel_patch.status()) == (unserved, "skipped", WHY)
    hf_kernel_patch.unpatch()


def test_one_model_says_so_in_a_warning_and_in_the_report_of_what_is_patched(
    unserved: str,
) -> None:
    model = tiny_model("llama")
    with pytest.warns(KernelPatchWarning, match=f"LlamaDecoderLayer.forward: {WHY}"):
        hf_kernel_patch.apply_default_kernels(model, SWIGLU)
    assert layer_row(hf_kernel_patch.status()) == (unserved, "skipped", WHY)
    hf_kernel_patch.unpatch(model)


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
