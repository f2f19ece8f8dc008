"""The report: rows, counts, and the three ways to look at them."""

from __future__ import annotations

import json
import logging
import pickle
from collections import Counter
from io import StringIO

import pytest

import hf_kernel_patch
from hf_kernel_patch import PatchReport, Row
from hf_kernel_patch.patching.report import Outcome
from hf_kernel_patch.recognition.outcome import SERVED, fallback
from tests.support.probes import LAYERS, NORM, ROPE, fallbacks, llama, logits, served
from tests.support.tiny import tiny_model

ROWS = (
    Row("llama", "m.LlamaRMSNorm.forward", "rms_norm", NORM, Outcome.PATCHED),
    Row("llama", "m.apply_rotary_pos_emb", "rope", ROPE, Outcome.SKIPPED, "it has other code"),
    Row("llama", "m.LlamaMLP.forward", "swiglu", "own", Outcome.SHADOWED, "2 own list[int]"),
    Row("gemma", "g.GemmaRMSNorm.forward", "rms_norm", NORM, Outcome.PENDING),
    Row("gemma", "g.apply_rotary_pos_emb", "rope", ROPE, Outcome.PENDING),
    Row(
        "qwen2",
        "q.Qwen2RMSNorm.forward",
        "rms_norm",
        NORM,
        Outcome.PATCHED,
        scope="model",
        instances=5,
    ),
)


@pytest.fixture
def report() -> PatchReport:
    calls = Counter({SERVED: 7, fallback("a tensor is float64"): 2})
    return PatchReport([Row(**{**vars(row), "calls": calls.copy()}) for row in ROWS])


def test_rows_are_found_by_outcome(report: PatchReport) -> None:
    rows = report.rows
    assert (len(report), list(report)) == (6, rows)
    assert report.patched == [rows[0], rows[2], rows[5]]
    assert report.skipped == [rows[1]]
    assert report.pending == [rows[3], rows[4]]
    assert report.with_outcome(Outcome.SHADOWED) == [rows[2]]


def test_json_holds_every_row(report: PatchReport) -> None:
    data = json.loads(report.to_json())
    assert data == report.as_dict()
    assert data["summary"] == report.summary()
    assert data["rows"][5] == {
        "architecture": "qwen2",
        "site": "q.Qwen2RMSNorm.forward",
        "code": "",
        "original": "",
        "diff": "",
        "op": "rms_norm",
        "kernel": NORM,
        "outcome": "patched",
        "reason": "",
        "scope": "model",
        "instances": 5,
        "served": 7,
        "fallbacks": {"a tensor is float64": 2},
        "graphs": {},
        "measured": "",
    }
    assert [row["outcome"] for row in data["rows"]] == [row.outcome for row in report]


def test_text_says_what_and_why(report: PatchReport) -> None:
    text = str(report)
    lines = text.splitlines()
    assert lines[0] == report.summary()
    assert lines[0].startswith("2 patched, 1 skipped, 1 shadowed, 2 pending; kernels: ")
    assert f"m.LlamaRMSNorm.forward -> {NORM}: 7 calls served; 2 fallbacks (a tensor" in text
    assert "it has other code" in text
    assert "5 modules of one model" in text
    assert lines[-1].strip() == "pending  gemma, when it is imported: rms_norm, rope"
    assert report.summary() in repr(report)


def test_table_says_the_same(report: PatchReport) -> None:
    from rich.console import Console

    console = Console(width=200, file=StringIO())
    console.print(report)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for row in report:
        assert row.site in text
    for words in ("it has other code", "2 own list[int]", "7 calls served", "2 fallbacks"):
        assert words in text


def test_summary_of_nothing_says_why() -> None:
    assert PatchReport().summary() == "nothing patched"
    assert PatchReport(note="no reason").summary() == "nothing patched: no reason"


def test_status_is_empty_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(hf_kernel_patch.status()) == 0
    assert "nothing patched: no" in str(hf_kernel_patch.status())
    monkeypatch.setenv("HF_KERNEL_PATCH_DISABLE", "1")
    report = hf_kernel_patch.patch_transformers(NORM)
    assert "HF_KERNEL_PATCH_DISABLE" in str(report)
    assert "HF_KERNEL_PATCH_DISABLE" in str(hf_kernel_patch.status())


def test_status_joins_everything_in_force() -> None:
    llama()
    model = tiny_model("llama", num_hidden_layers=1)
    with hf_kernel_patch.patched(NORM, models="llama"):
        hf_kernel_patch.patch_transformers(ROPE, models="llama")
        hf_kernel_patch.apply_kernel("torch_fused_swiglu", model=model)
        found = {(row.op, row.scope, row.instances) for row in hf_kernel_patch.status().patched}
    hf_kernel_patch.unpatch()
    assert found == {
        ("rms_norm", "global", None),
        ("rope", "global", None),
        ("swiglu", "model", 1),
    }


def test_calls_are_counted_only_when_asked() -> None:
    model = tiny_model("llama")
    with hf_kernel_patch.patched(LAYERS, models="llama") as report:
        logits(model)
        assert served(report) == 0
        hf_kernel_patch.count_calls()
        logits(model)
        # two layers: two norms each and the last one, one rotary and one MLP each
        counts = {row.op: row.served for row in report}
        assert counts == {"rms_norm": 5, "rope": 2, "swiglu": 2}
        assert {row.op: row.served for row in hf_kernel_patch.status()} == counts
        hf_kernel_patch.count_calls(False)
        logits(model)
        assert served(report) == 9
        assert not fallbacks(report)
    logits(model)
    assert served(report) == 9


def test_counts_of_a_new_patch_start_at_zero() -> None:
    model = tiny_model("llama")
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(NORM, models="llama") as first:
        logits(model)
    with hf_kernel_patch.patched(NORM, models="llama") as second:
        assert served(second) == 0
        logits(model)
    assert (served(first), served(second)) == (5, 5)


def test_counts_go_to_every_block_in_force() -> None:
    model = tiny_model("llama")
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(NORM, models="llama") as outer:
        with hf_kernel_patch.patched(NORM, models="llama") as inner:
            logits(model)
        assert served(inner) == served(outer) == 5


def test_fallbacks_are_counted_with_the_reason() -> None:
    model = tiny_model("llama").double()
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(NORM, models="llama") as report:
        logits(model)
        assert fallbacks(report) == {"a tensor is float64": 5}
        assert "5 fallbacks (a tensor is float64)" in str(report)


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_one_summary_line_is_logged_by_the_first_rank(
    rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO, logger="hf_kernel_patch"):
        report = hf_kernel_patch.patch_transformers(NORM, models="llama")
        hf_kernel_patch.patch_transformers(NORM, models="llama")
    hf_kernel_patch.unpatch()
    assert [record.getMessage() for record in caplog.records] == [report.summary()] * lines


def test_a_report_that_is_sent_elsewhere_shows_the_diff_of_its_time() -> None:
    llama()
    with hf_kernel_patch.patched("swiglu", models="llama") as report:
        (row,) = pickle.loads(pickle.dumps(report.rows))
        assert row == report.rows[0]
        assert row.diff == report.rows[0].diff != ""
    assert row.diff != report.rows[0].diff == ""
