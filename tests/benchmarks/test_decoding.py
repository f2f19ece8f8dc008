"""The decode command and its parts, on a CPU at tiny shapes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import hf_kernel_patch
from benchmarks.__main__ import app
from benchmarks.measure import decoding, graphs, logits, memory, processes
from benchmarks.report import markdown, results
from benchmarks.workloads import models
from benchmarks.workloads.variants import VARIANTS
from tests.benchmarks.commands import command, report, written

STACKED_EXPERTS = Version(transformers.__version__) >= Version("5")
NAMES = ["llama-3.2-1b", *(["qwen3-30b-a3b"] if STACKED_EXPERTS else [])]


def tiny(name: str, device: str = "cpu", **sizes: int) -> tuple[dict[str, Any], Any]:
    """The job of a worker, and the model."""
    config = models.config(name, "cpu", quick=True)
    job = {"config": config, "device": device, "dtype": "fp32", "warmup": 0}
    job |= {"batch": 2, "prompt": 8, "new": 6} | sizes
    return job, models.build(config, device, torch.float32, None)


def test_every_batch_has_a_row_of_every_variant_with_its_parts(tmp_path: Path) -> None:
    arguments = ("--quick", "--device", "cpu", "--out", str(tmp_path), "--new", "5")
    only = ("--only", "ours,eager,loop")
    printed = command("decode", "llama-3.2-1b", *arguments, *only, "--batch", "1,2", "--batch", "2")
    found = written(tmp_path)
    assert found["options"]["batches"] == [1, 2]
    assert "CUDA" in found["absent"]["graph"]
    places = [(row["batch"], row["variant"]) for row in found["rows"]]
    assert places == [(size, name) for size in (1, 2) for name in ("eager", "loop", "ours")]
    for row in found["rows"]:
        assert row["error"] is None
        assert row["first_s"] > 0 and row["prefill_s"] > 0 and row["peak_gib"] > 0
        assert {"later_s", "start_s", "preparation_s", "ms_per_token"} <= row.keys()
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms_per_token"] * 1e3)
        if row["variant"] == "loop":
            assert "tokens" not in row and "bytes_ms" not in row
        else:
            assert row["same_tokens"] == 5 and row["bytes_ms"] > 0
    (checked,) = [row for row in found["rows"] if "logits_error" in row]
    assert (checked["variant"], checked["batch"]) == ("ours", 1)
    assert checked["checked_tokens"] == 5
    assert max(checked["logits_error"], checked["logits_error_original"]) < 1e-5
    assert "ms/token" in printed and "ours" in printed
    text = report(tmp_path)
    assert "| 2 | 2 | 8 | loop |" in text and "- loop: `generate`" in text


def test_a_worker_that_fails_gets_a_row_at_every_batch(tmp_path: Path) -> None:
    arguments = ("--quick", "--device", "cpu", "--only", "ours", "--out", str(tmp_path))
    command("decode", "qwen2.5-1.5b", *arguments, "--include", "rpoe", "--batch", "1,2")
    rows = written(tmp_path)["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    assert all("rpoe" in row["error"] for row in rows)


@pytest.mark.parametrize("batch", ["0", "1,", "a"])
def test_what_is_no_batch_is_refused(batch: str) -> None:
    done = CliRunner().invoke(app, ["decode", "llama-3.2-1b", "--batch", batch])
    assert done.exit_code == 2 and "no number of sequences" in done.output


class Waiting(TorchDispatchMode):
    """Notes the operations that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "unique2"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not STACKED_EXPERTS, reason="its static cache counts on the host")
@pytest.mark.parametrize("name", NAMES)
def test_the_step_that_a_graph_is_made_of_decodes_and_waits_for_nothing(name: str) -> None:
    job, model = tiny(name)
    with torch.no_grad():
        expected = decoding.Generating(job, VARIANTS["eager"], model).generate(job["new"])
        run = graphs.Replaying(job, VARIANTS["graph"], model)
        waiting = Waiting()

        def replay() -> None:
            with waiting:
                run.step()

        run.graph = SimpleNamespace(replay=replay)
        for _ in range(2):
            assert torch.equal(run.generate(job["new"]), expected)
    assert not waiting.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_decodes_what_generate_does(name: str) -> None:
    job, model = tiny(name, "cuda", new=32)
    expected = decoding.Generating(job, VARIANTS["eager"], model).generate(32)
    info, measure = decoding.prepare(job, VARIANTS["graph"], model)
    assert info["tokens"] == expected[0, 8:].tolist()
    assert measure()["seconds"][0] > 0
    assert info["prefill_gib"] > 0 and info["decode_gib"] > 0


def test_the_loop_calls_nothing_of_the_model_and_its_cache_grows() -> None:
    job, model = tiny("llama-3.2-1b")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model is called"))
    run = decoding.Generating(job, VARIANTS["loop"], model)
    lengths = []
    forward = model.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        lengths.append(found[models.cache_name(model)].get_seq_length())
        return found

    noting.__wrapped__ = forward  # type: ignore[attr-defined]
    model.forward = noting
    assert run.generate(4).shape == (2, 12)
    assert lengths == [8, 9, 10, 11]


def test_logits_are_checked_against_the_original_and_nothing_stays_patched() -> None:
    hf_kernel_patch.patch_transformers(models="llama")
    try:
        job, model = tiny("llama-3.2-1b", new=4)
        found = logits.check(job, model)
    finally:
        hf_kernel_patch.unpatch()
    assert not hf_kernel_patch.status().rows
    assert len(found["checked_tokens"]) == 4
    assert all(found[key] < 1e-5 for key in found if key != "checked_tokens")


def test_a_wrong_patch_shows_in_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    job, model = tiny("llama-3.2-1b", new=4)
    norm = model.model.norm.weight
    with torch.no_grad():
        norm[0] += 0.5
    before = norm.clone()
    before[0] -= 0.5
    monkeypatch.setattr(hf_kernel_patch, "unpatch", lambda: norm.data.copy_(before))
    found = logits.check(job, model)
    assert found["logits_error"] > 1e-3 > found["logits_error_original"]


def test_bytes_of_a_token_are_those_of_the_weights_and_the_cache() -> None:
    job, model = tiny("llama-3.2-1b")
    weights = 4 * sum(weight.numel() for weight in model.parameters())
    assert models.bytes_of_token(model, 1, 0) == weights  # the embedding is the head
    of_one = models.bytes_of_token(model, 3, 10) - models.bytes_of_token(model, 3, 9)
    assert of_one == 3 * 2 * 2 * 2 * 16 * 4  # batch, key and value, layers, heads, width, fp32
    job, model = tiny("qwen3-30b-a3b")
    experts = 4 * sum(w.numel() for name, w in model.named_parameters() if ".experts." in name)
    table = 4 * model.get_input_embeddings().weight.numel()
    weights = 4 * sum(weight.numel() for weight in model.parameters()) - table - experts
    for batch, share in ((1, 0.5), (2, 1.0), (8, 1.0)):  # two experts of four a token
        rows = batch * job["config"]["hidden_size"] * 4
        assert models.bytes_of_token(model, batch, 0) == weights + rows + int(share * experts)


def test_what_follows_the_first_call_is_told_apart() -> None:
    events = []

    class Noting(torch.nn.Module):
        def forward(self) -> None:
            events.append("call")

    def after() -> None:
        events.append("after")

    model, other = Noting(), Noting()
    with memory.after_first_call(model, lambda: events.append("told")):
        other()
        model()
        after()
        model()
    assert events == ["call", "call", "told", "after", "call"]


def test_answers_are_joined_to_medians_and_keep_an_error() -> None:
    answers = [{"first_s": 9.0}, *({"seconds": [x], "prefill_s": x} for x in (1.0, 5.0, 2.0))]
    found = processes.joined(answers)
    assert found == {
        "error": None,
        "seconds": [1.0, 5.0, 2.0],
        "first_s": 9.0,
        "prefill_s": 2.0,
        "median_s": 2.0,
    }
    assert processes.joined([*answers[:1], {"error": "late"}])["error"] == "late"


def test_older_results_have_a_section_without_the_newer_columns(tmp_path: Path) -> None:
    row = {"model": "llama", "variant": "eager", "layers": 2, "batch": 1, "prompt": 8}
    row |= {"error": None, "ms_per_token": 2.0, "tokens_per_s": 500.0, "first_s": 3.0}
    row |= {"peak_gib": 1.5, "same_tokens": 4}
    old = {"kind": "decode", "dtype": "bf16", "device": {"name": "old"}, "date": "2026-01-01"}
    old |= {"versions": {}, "command": "python -m benchmarks", "rows": [row]}
    into, *charts = markdown.write(results.merge([old]), tmp_path / "RESULTS.md")
    assert "| 2 | 1 | 8 | eager | 500 | 2.00 | 3s | 1.50 | 4 |" in into.read_text()
    assert len(charts) == 2 and all(chart.exists() for chart in charts)
