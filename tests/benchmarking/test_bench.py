"""``bench``: variants are what they claim, a slow kernel is named, failures take nothing down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import Benchmark, KernelPatchWarning, bench
from hf_kernel_patch.benchmarking.variants import alone, without
from tests.benchmarking.benches import Clock, Progress, measured, swiglu_that
from tests.support.pages import blocks
from tests.support.probes import NORM, ROPE, watched_kernel
from tests.support.tiny import tiny_model

WORKS = ("training", "decoding")


def test_a_slow_kernel_is_named_as_losing_and_another_one_as_no_gain() -> None:
    clock = Clock()

    def slow() -> None:
        clock.time += 0.25

    with swiglu_that(slow):
        found = measured(tiny_model("llama"), rounds=8, now=clock)
    assert {*found.ops} == {"swiglu", "rms_norm"} and found.workloads == WORKS
    assert found.served["training"] == {"swiglu": 2, "rms_norm": 5}
    for work, calls in (("training", 2), ("decoding", 4)):
        alone_, left_out = found.gain_alone(work, "swiglu"), found.loss_without(work, "swiglu")
        assert alone_ is not None and left_out is not None
        assert alone_.time.median == pytest.approx(-0.25 * calls) and alone_.time.beyond_noise
        assert left_out.time.median == pytest.approx(-0.25 * calls) and left_out.time.beyond_noise
        norm = found.gain_alone(work, "rms_norm")
        assert norm is not None and not norm.time.beyond_noise
    lines = str(found).splitlines()
    assert sum(line == "Slower: swiglu" for line in map(_without_memory, lines)) == 2
    assert sum(line.startswith("In all, training is slower when patched: ") for line in lines) == 1
    assert any(line.startswith("In all, decoding is slower when patched: ") for line in lines)
    assert found.row("training", "eager").time.median == pytest.approx(0.1)
    assert found.row("training", "eager").speed.median == pytest.approx(340)
    assert found.row("decoding", "eager").speed.median == pytest.approx(2 * 2 / 0.1)


def _without_memory(line: str) -> str:
    """A verdict without what the noise of this machine's memory adds to it."""
    return line.replace(", but memory is saved", "")


def test_a_kernel_that_takes_less_than_the_original_is_a_gain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    of_originals_alone(monkeypatch, lambda: setattr(clock, "time", clock.time + 1.0))
    found = measured(tiny_model("llama"), include=f"{NORM},{ROPE}", rounds=8, decode=0, now=clock)
    gain = found.loss_without("training", "rms_norm")
    assert gain is not None and gain.time.median == pytest.approx(5.0) and gain.time.beyond_noise
    assert found.gain_alone("training", "rms_norm") == found.gain("training", without("rope"))
    assert "In all, training runs at 51.00 times the speed when patched, +5000.00" in str(found)


def of_originals_alone(monkeypatch: pytest.MonkeyPatch, does: Callable[[], object]) -> None:
    """Has the norms of transformers, and no kernel, do something more."""
    rsqrt = torch.rsqrt

    def slow(x: torch.Tensor) -> torch.Tensor:
        does()
        return rsqrt(x)

    monkeypatch.setattr(torch, "rsqrt", slow)


def test_each_variant_runs_with_the_kernels_that_it_names_and_no_other() -> None:
    told = Progress()
    calls: dict[str, set[str]] = defaultdict(set)
    with watched_kernel("own_rmsnorm") as norms, swiglu_that(lambda: calls[told.now].add("swiglu")):
        before = 0

        def counted(text: str) -> None:
            nonlocal before
            if norms.calls > before:
                calls[last[0]].add("rms_norm")
            last[0], before = text.rpartition(", ")[2], norms.calls

        last = ["eager"]
        told._then = counted
        include = f"own_rmsnorm,watched_swiglu,{ROPE}"
        found = measured(tiny_model("llama"), include=include, told=told, decode=0)
        counted("end")
    assert calls == {
        "patched": {"swiglu", "rms_norm"},
        alone("swiglu"): {"swiglu"},
        alone("rms_norm"): {"rms_norm"},
        without("swiglu"): {"rms_norm"},
        without("rms_norm"): {"swiglu"},
        without("rope"): {"swiglu", "rms_norm"},
    }
    names = [row.variant for row in found.rows]
    pairs = [name for op in ("rms_norm", "swiglu", "rope") for name in (alone(op), without(op))]
    assert sorted(names) == sorted(["eager", "patched", *pairs])
    assert not any(row.same_as or row.failed for row in found.rows)
    assert {len(row.seconds) for row in found.rows} == {2}


def test_what_is_the_same_is_measured_once() -> None:
    with swiglu_that(lambda: None):
        found = measured(tiny_model("llama"), decode=0)
        same = {row.variant: row.same_as for row in found.rows if row.same_as}
        assert same == {without("swiglu"): alone("rms_norm"), without("rms_norm"): alone("swiglu")}
        one = measured(tiny_model("llama"), include="watched_swiglu")
    for work in WORKS:
        assert one.row(work, alone("swiglu")).same_as == "patched"
        assert one.row(work, without("swiglu")).same_as == "eager"
        assert one.gain_alone(work, "swiglu") == one.gain(work)
    assert "swiglu alone" not in str(one)


def test_an_op_that_serves_no_call_of_a_workload_is_not_judged_there() -> None:
    kernels = f"{NORM},torch_fused_linear_cross_entropy"
    found = measured(tiny_model("llama"), include=kernels, rounds=8)
    assert {*found.ops_in("training")} == {"rms_norm", "linear_cross_entropy"}
    assert found.ops_in("decoding") == ("rms_norm",)
    assert (
        "linear_cross_entropy"
        not in str(found).partition("decoding: ")[2].partition("alone: ms")[2]
    )
    assert [*found.fallbacks["decoding"]] == ["no labels: there is no loss"]
    only = measured(tiny_model("llama"), include="torch_fused_linear_cross_entropy", rounds=8)
    assert "nothing is gained in decoding: no kernel serves a call there." in str(only)


def test_ops_may_be_left_out_and_are_then_not_told() -> None:
    with swiglu_that(lambda: None):
        found = measured(tiny_model("llama"), ops=False, decode=0, rounds=8)
    assert [row.variant for row in found.rows] == ["eager", "patched"]
    assert "What each op gains" not in str(found)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("the kernel is wrong"), "RuntimeError: the kernel is wrong"),
    ],
)
def test_variants_that_fail_are_told_and_the_others_go_on(error: Exception, words: str) -> None:
    def fail() -> None:
        raise error

    model = tiny_model("llama")
    with swiglu_that(fail):
        found = measured(model, rounds=8)
    for work in WORKS:
        failed = {row.variant: row.failed for row in found.rows if row.workload == work}
        assert failed["patched"] == failed[alone("swiglu")] == words
        assert failed["eager"] == failed[without("swiglu")] == ""
        assert len(found.row(work, without("swiglu")).seconds) == 8
        assert found.gain(work) is None
    assert f"In all, training cannot be compared (patched: {words})." in str(found)
    assert not hf_kernel_patch.status().rows
    assert all(one.grad is None for one in model.parameters())


def test_a_failure_in_a_later_round_takes_that_variant_out_alone() -> None:
    calls = 0

    def fail_late() -> None:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with swiglu_that(fail_late):
        found = measured(tiny_model("llama"), rounds=8, decode=0)
    assert found.row("training", "patched").failed == "out of memory"
    assert found.row("training", "patched").seconds == ()
    assert len(found.row("training", "eager").seconds) == 8


def test_a_model_that_fits_only_when_patched_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    of_originals_alone(monkeypatch, full)
    found = measured(tiny_model("llama"), include=NORM, decode=0)
    assert found.row("training", "eager").failed == "out of memory"
    assert len(found.row("training", "patched").seconds) == 2
    assert "cannot be compared (eager: out of memory)" in str(found)


def test_one_line_of_python_and_what_it_prints() -> None:
    said: list[str] = []
    found = bench(
        tiny_model("llama"), None, NORM, models="llama", decode=2, rounds=1, progress=said.append
    )
    assert isinstance(found, Benchmark)
    assert said[:3] == ["trying training", "trying decoding", "warming up: 0 of 3, patched"]
    assert "1 round is too little to tell a difference from noise" in str(found)
    assert "LlamaForCausalLM, 2 layers, 0.1 M parameters, float32 on cpu" in found.title
    assert "batch of 2 x 64" in found.title


def test_the_compiled_model_is_measured_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    compile, graphs = torch.compile, list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=backend))
    found = measured(tiny_model("llama"), include=NORM, ops=False, compiled=True, decode=1)
    assert len(graphs) == 1  # patching the model in between costs no compilation
    assert found.row("training", "compile").failed == ""
    assert len(found.row("training", "compile").seconds) == 2
    assert found.row("decoding", "compile") is None
    assert "generate() calls the model itself" in found.unmeasured["compile, decoding"]


def test_what_is_skipped_is_told_once() -> None:
    with pytest.warns(KernelPatchWarning, match="no site matches") as told:
        bench(
            tiny_model("llama"),
            include=f"{NORM},{ROPE}",
            models="llama",
            exclude="*.LlamaMPL.forward",
            decode=0,
            rounds=1,
            progress=str,
        )
    assert len([one for one in told if one.category is KernelPatchWarning]) == 1


def test_the_example_of_its_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("bench.md", "python")
    exec(example, {})
    assert "training: forward and backward" in capsys.readouterr().out
    assert not hf_kernel_patch.status().rows
