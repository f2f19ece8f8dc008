"""The convergence benchmark on a CPU, for a few steps."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import convergence
from tests.benchmarks.commands import command, report, written


def test_small_models_learn_the_same_patched_and_the_report_shows_it(tmp_path: Path) -> None:
    command("convergence", "--quick", "--out", str(tmp_path))
    rows = written(tmp_path)["rows"]
    assert [row["case"] for row in rows] == ["llama"] * 3 + ["qwen3_moe"] * 3
    assert [row["variant"] for row in rows[:3]] == list(convergence.VARIANTS)
    assert all(len(row["losses"]) == 3 for row in rows)
    assert all(row["largest"] < 1e-3 for row in rows)
    assert "fused_linear_cross_entropy" in rows[1]["patch"]
    assert rows[0]["largest"] == 0
    text = report(tmp_path)
    assert "| llama | patched |" in text
    assert "convergence-fp32.png" in text
