"""Asking for it: arguments, variables, files and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hf_kernel_patch
from hf_kernel_patch import registry, settings
from hf_kernel_patch.cli.commands import app
from tests.measuring.worlds import Clock, Training, measured
from tests.support.tiny import tiny_model

EXTRAS = {"swiglu", "add_rms_norm", "qk_norm_rope", "linear_cross_entropy"}


@pytest.mark.parametrize("value", ["measured", " Measured ", ["measured"], ("measured",)])
def test_the_word(value: Any) -> None:
    assert settings.resolve(include=value).include == "measured"


@pytest.mark.parametrize("value", ["measured,rope", ["rope", "measured"], "auto,measured"])
def test_it_stands_alone(value: Any) -> None:
    with pytest.raises(ValueError, match="stands alone, it cannot be mixed with ids"):
        hf_kernel_patch.patch_transformers(value)


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", "measured")
    assert settings.requested_by_environment()
    report = hf_kernel_patch.patch_transformers(models="llama")
    assert measured(report)
    hf_kernel_patch.unpatch()


@pytest.mark.parametrize(
    ("text", "include"),
    [
        ("include_kernels: measured", "measured"),
        ("name: measured", "measured"),
        ("name: measured\ninclude_kernels: auto", "measured"),
        ("name: torch_fused_rmsnorm\ninclude_kernels: measured", "measured"),
        ("name: measured\ninclude_kernels: rope", ("rope",)),
        ("name: measured\ninclude_kernels: false", None),
    ],
)
def test_a_file(tmp_path: Path, text: str, include: Any) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    assert settings.resolve(file).include == include


def test_it_takes_what_auto_takes_and_what_may_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, tried = registry.select("auto"), registry.select("measured")
    assert auto.items() <= tried.items()
    if set(auto) == {"rms_norm", "rope", "moe"}:  # on a CPU
        assert set(tried) - set(auto) == EXTRAS
    assert registry.select("measured", exclude=("swiglu", "rope")).keys() == tried.keys() - {
        "swiglu",
        "rope",
    }


def test_what_auto_leaves_out_serves_nothing_before_it_is_measured(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("measured", models="llama", strict=True) as report:
        training.step()
        assert {row.op for row in report.patched if row.served} == {"rms_norm", "rope"}


def test_a_backend_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown backend"):
        hf_kernel_patch.patch_transformers("measured", backend="tritn")
    with pytest.raises(ValueError, match="unknown option"):
        hf_kernel_patch.patch_transformers("measured", options="linear_cross_entropy.exakt=1")


def test_a_second_equal_call_goes_on(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    hf_kernel_patch.patch_transformers("measured", models="llama")
    for _ in range(10):
        training.step()
    report = hf_kernel_patch.patch_transformers("measured", models="llama")
    assert all(": 8 of at most" in text for text in measured(report).values())
    report = hf_kernel_patch.patch_transformers("auto", models="llama")
    assert set(measured(report).values()) == {""}
    hf_kernel_patch.unpatch()


def test_while_sites_are_bisected_nothing_is_measured(clock: Clock) -> None:
    texts: set[str] = set()

    def right() -> bool:
        training = Training(tiny_model("llama"), clock)
        for _ in range(5):
            training.step()
        texts.update(measured(hf_kernel_patch.status()).values())
        return True

    found = hf_kernel_patch.bisect(right, "measured", models="llama", progress=lambda line: None)
    assert found.proven and texts == {""}


def test_the_commands_take_it(tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(app, ["status", "llama", "--include", "measured", "--json"])
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)["rows"]
    assert {row["measured"] for row in rows} == {"measured: no step is timed yet"}
    refused = run(app, ["run", "--include", "measured,rope", "-m", "this"])
    assert refused.exit_code != 0
    assert "stands alone" in refused.output
