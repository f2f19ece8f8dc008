"""The command line, in this process and as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama import modeling_llama

import hf_kernel_patch
from hf_kernel_patch import models, registry
from hf_kernel_patch import version as package_version
from hf_kernel_patch.kernels import BaseKernel, register_kernel
from tests.cli.commands import ROOT, invoke
from tests.support.tiny import ARCHITECTURES, ROWS, ops_of, tiny_config


def answer(*arguments: Any, code: int = 0) -> Any:
    """What a command prints as JSON, and with which exit code."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_list_shows_every_kernel_and_whether_it_runs_here() -> None:
    listed = {one["kernel_id"]: one for one in answer("list")}
    assert listed.keys() == registry.kernels().keys()
    assert {k for k, one in listed.items() if one["default"]} == {
        *hf_kernel_patch.get_default_kernels()
    }
    assert {k for k, one in listed.items() if one["unavailable"] is None} == {
        *hf_kernel_patch.get_available_kernels()
    }
    text = invoke("list").stdout
    assert all(kernel_id in text for kernel_id in listed)


def test_list_says_why_a_kernel_cannot_run() -> None:
    members = {"kernel_id": "needy", "op": "rms_norm", "requires": ("no_such_package",)}
    register_kernel(type("Needy", (BaseKernel,), members))
    try:
        (needy,) = [one for one in answer("list") if one["kernel_id"] == "needy"]
        assert needy["unavailable"] == "needs the package no_such_package"
        assert "no: needs the package no_such_package" in invoke("list").stdout
    finally:
        del registry.kernels()["needy"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_status_of_a_type_names_every_site_and_leaves_nothing_patched(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", ",".join(ops_of(name)))
    rows = answer("status", name)["rows"]
    assert [row["site"] for row in rows] == [spec.name for own, spec in ROWS if own == name]
    assert {row["outcome"] for row in rows} == {"patched"}
    assert not hf_kernel_patch.status().rows


def test_status_of_a_saved_model_is_that_of_its_type(tmp_path: Path) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    assert answer("status", tmp_path) == answer("status", "qwen3")


@pytest.mark.skipif("qwen3_5" not in ARCHITECTURES, reason="this transformers has no Qwen3.5")
def test_status_of_a_saved_text_model_is_that_of_the_model_around_it(tmp_path: Path) -> None:
    tiny_config("qwen3_5").save_pretrained(tmp_path)
    assert answer("status", tmp_path) == answer("status", "qwen3_5")


def test_status_shows_what_the_defaults_patch() -> None:
    rows = answer("status", "llama")["rows"]
    with hf_kernel_patch.patched(models="llama") as report:
        assert [(row["site"], row["kernel"]) for row in rows] == [
            (row.site, row.kernel) for row in report
        ]
    text = invoke("status", "llama").stdout
    assert all(f"{row['site']} -> {row['kernel']}" in text for row in rows)


def test_status_without_a_target_takes_every_architecture() -> None:
    report = answer("status")
    taken = registry.defaults().keys()
    assert {row["architecture"] for row in report["rows"]} == {
        name for name in ARCHITECTURES if taken & set(ops_of(name))
    }
    served = {spec.name for _, spec in ROWS}
    assert {row["outcome"] for row in report["rows"] if row["site"] in served} == {"patched"}


@pytest.mark.parametrize(
    ("variable", "value", "note"),
    [
        ("HF_KERNEL_PATCH", "0", "no kernel is chosen"),
        ("HF_KERNEL_PATCH_DISABLE", "1", "HF_KERNEL_PATCH_DISABLE is set"),
        ("HF_KERNEL_PATCH_MODELS", "qwen2", "HF_KERNEL_PATCH_MODELS leaves llama out"),
    ],
)
def test_status_follows_the_environment(
    variable: str, value: str, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    found = answer("status", "llama")
    assert found["summary"] == f"nothing patched: {note}"
    assert (found["note"], found["rows"]) == (note, [])


def test_status_reports_a_kernel_that_finds_no_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", "torch_fused_moe")
    monkeypatch.setenv("HF_KERNEL_PATCH_STRICT", "1")
    (row,) = answer("status", "llama")["rows"]
    assert (row["outcome"], row["reason"]) == (
        "skipped",
        "torch_fused_moe found no site in llama",
    )


def test_status_and_doctor_report_a_module_that_cannot_be_imported() -> None:
    table = models.Architecture("absent", {"AbsentNorm.forward": "rms_norm.llama"})
    models.register_model(table)
    try:
        (row,) = answer("status", "absent")["rows"]
        assert row["outcome"] == "skipped"
        assert "No module named 'transformers.models.absent'" in row["reason"]
        found = answer("doctor", code=1)["tables"]
        (row,) = [one for one in found if one["architecture"] == "absent"]
        assert "No module named 'transformers.models.absent'" in row["reason"]
    finally:
        del models.architectures()["absent"]


def test_status_of_an_unknown_type_names_the_near_ones() -> None:
    result = invoke("status", "qwen3_mo")
    assert result.exit_code == 2
    assert not result.stdout
    assert "unknown model type or directory 'qwen3_mo'" in result.stderr
    assert "did you mean 'qwen3_moe'" in result.stderr


@pytest.mark.parametrize(
    ("config", "code", "message"),
    [
        (None, 1, "config.json"),
        ("{}", 2, "names no model_type"),
        ("[1]", 2, "names no model_type"),
        ("not json", 2, "names no model_type"),
        ('{"model_type": "lama"}', 2, "did you mean 'llama'"),
    ],
)
def test_status_of_a_directory_that_tells_nothing(
    config: str | None, code: int, message: str, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    result = invoke("status", tmp_path)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


def test_doctor_checks_every_row_and_names_the_versions() -> None:
    found = answer("doctor")
    for package in ("torch", "transformers", "wrapt"):
        assert found["versions"][package] == version(package)
    assert found["versions"]["hf-kernel-patch"] == hf_kernel_patch.__version__
    assert [one["current"] for one in found["devices"]].count(True) >= 1
    assert [row["site"] for row in found["tables"]] == [spec.name for _, spec in ROWS]
    assert [row for row in found["tables"] if row["reason"]] == []
    assert not any("contextlib" in one["by"] for one in found["foreign"])
    text = invoke("doctor").stdout
    assert f"tables: {len(found['tables'])} rows, 0 would be skipped" in text


def test_doctor_names_a_foreign_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: Any) -> Any:
        return hidden_states

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    found = answer("doctor", code=1)["foreign"]
    found = [one for one in found if "LlamaRMSNorm" in one["site"]]
    (one,) = found
    assert one["by"].endswith(f"forward of {__name__}")
    assert one["effect"] == f"patched by {__name__}: its code is not the original's"
    result = invoke("doctor")
    text = result.stdout
    assert result.exit_code == 1
    assert f"skipped {one['site']}: {one['effect']}" in text
    assert f"foreign {one['site']} is {one['by']}" in text


def test_doctor_does_not_take_our_own_patch_for_a_foreign_one() -> None:
    before = answer("doctor")
    with hf_kernel_patch.patched("rms_norm,rope", models="llama"):
        assert answer("doctor") == before


@pytest.mark.parametrize("command", [("status", "llama"), ("run", __file__)], ids=["status", "run"])
def test_a_bad_variable_is_told_without_a_traceback(command: tuple[str, ...]) -> None:
    variables = {
        "HF_KERNEL_PATCH": "rms_nrm",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "hf_kernel_patch", *command],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("hf-kernel-patch: unknown kernel id or op 'rms_nrm'")
    assert "in the variable HF_KERNEL_PATCH; did you mean 'rms_norm'" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_the_package_s() -> None:
    assert invoke("--version").stdout.strip() == hf_kernel_patch.__version__


def test_a_transformers_newer_than_the_tested_ones_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert answer("doctor")["newer"] == answer("status", "llama")["newer"] == ""
    monkeypatch.setattr(package_version, "NEWEST_TRANSFORMERS", "4.51.0")
    said = f"transformers {version('transformers')} is newer than 4.51.0, the newest that is tested"
    assert answer("doctor")["newer"] == answer("status", "llama")["newer"] == said
    assert said in invoke("doctor").stdout
    assert said in invoke("status", "llama").stdout


def test_diff_shows_what_is_rewritten_and_patches_nothing() -> None:
    before = modeling_llama.LlamaDecoderLayer.forward
    text = invoke("diff", "llama", "DecoderLayer").stdout
    assert modeling_llama.LlamaDecoderLayer.forward is before
    lines = text.splitlines()
    kernel = registry.select(("add_rms_norm",))["add_rms_norm"].kernel_id
    assert lines[0].endswith(f"LlamaDecoderLayer.forward: residual_norm -> {kernel}")
    taken = [line for line in lines if line.startswith("-") and not line.startswith("---")]
    assert taken == [
        "-        hidden_states = residual + hidden_states",
        "-        hidden_states = self.post_attention_layernorm(hidden_states)",
    ]
    source = Path(modeling_llama.__file__).read_text().splitlines()
    (hunk,) = [line for line in lines if line.startswith("@@")]
    first = int(hunk.split()[1][1:].split(",")[0])
    shown = [line[1:] for line in lines if line[:1] in " -" and not line.startswith("---")]
    assert source[first - 1 : first - 1 + len(shown)] == shown


def test_diff_names_leaves_and_what_it_does_not_find() -> None:
    text = invoke("diff", "llama", "RMSNorm", "--include", "rms_norm").stdout
    assert "rms_norm.llama -> " in text and "in place of the whole function" in text
    result = invoke("diff", "llama", "Nowhere")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "llama has no site with 'Nowhere' in its name" in result.stderr
    assert "did you mean 'llama'" in invoke("diff", "lama").stderr
