"""Code that no kernel serves, and experts that the user chose: the report says so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hf_kernel_patch
from hf_kernel_patch import KernelPatchWarning
from hf_kernel_patch.cli.commands import app
from tests.probes import MOE
from tests.tiny import ARCHITECTURES, TRANSFORMERS_5, modelling, tiny_config, tiny_model

pytestmark = pytest.mark.skipif("gpt_oss" not in ARCHITECTURES, reason="there is no GPT-OSS")
WHY = "no kernel computes experts that are interleaved, transposed and biased"


def experts_row(report: Any) -> tuple[str, str, str]:
    """Architecture, outcome and reason of the row of GPT-OSS's experts."""
    (row,) = [row for row in report if row.site.endswith("GptOssExperts.forward")]
    return row.architecture, row.outcome, row.reason


@pytest.mark.parametrize("include", ["moe", "rms_norm,moe"])
def test_a_global_patch_reports_them_and_does_not_complain(include: str) -> None:
    modelling("gpt_oss")
    forward = modelling("gpt_oss").GptOssExperts.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hf_kernel_patch.patched(include, strict=True) as report:
            assert experts_row(report) == ("gpt_oss", "skipped", WHY)
            assert modelling("gpt_oss").GptOssExperts.forward is forward


def test_a_kernel_that_was_asked_for_by_name_found_no_site_there() -> None:
    modelling("gpt_oss")
    with pytest.warns(KernelPatchWarning, match="found no site in gpt_oss"):
        hf_kernel_patch.patch_transformers("moe", models="gpt_oss")
    assert experts_row(hf_kernel_patch.status()) == ("gpt_oss", "skipped", WHY)
    hf_kernel_patch.unpatch()


@pytest.mark.parametrize("include", [MOE, "auto", f"torch_fused_rmsnorm,{MOE}"])
def test_one_model_says_so_in_a_warning_and_in_the_report_of_what_is_patched(include: str) -> None:
    model = tiny_model("gpt_oss")
    with pytest.warns(KernelPatchWarning, match=f"GptOssExperts.forward: {WHY}"):
        hf_kernel_patch.apply_default_kernels(model, include)
    if "rmsnorm" in include:
        assert experts_row(hf_kernel_patch.status()) == ("gpt_oss", "skipped", WHY)
    hf_kernel_patch.unpatch(model)


def test_the_command_line_reports_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config("gpt_oss").save_pretrained(tmp_path)
    monkeypatch.setenv("HF_KERNEL_PATCH", "rms_norm,moe")
    done = CliRunner().invoke(app, ["status", str(tmp_path), "--json"])
    found = {
        row["site"].rpartition("modeling_gpt_oss.")[2]: row
        for row in json.loads(done.stdout)["rows"]
    }
    assert found["GptOssExperts.forward"]["reason"] == WHY
    assert found["GptOssRMSNorm.forward"]["outcome"] == "patched"


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
    assert row.reason == (f"experts_implementation={asked!r} was asked for" if left else "")
    assert row.outcome == "patched"
    hf_kernel_patch.unpatch(model)
