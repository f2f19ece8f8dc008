"""The runs of the demo, in this process: training, decoding, memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch.benchmarking import memory
from hf_kernel_patch.cli.demo import models, telling, worker
from tests.cli.short_demo import PLAN, SHORT
from tests.support.tiny import ops_of

TORCH = ("rms_norm", "rope", "swiglu")


@pytest.mark.parametrize("name", models.MODELS)
def test_patched_run_of_each_model_repeats_the_losses_and_gives_everything_back(
    name: str,
) -> None:
    plan = replace(PLAN, model=name)
    eager = worker.Run(plan)
    expected = [eager.step() for _ in range(2)]
    assert all(seconds > 0 for _, seconds in expected)
    assert not eager.report().rows
    include = (*TORCH, *(["moe"] if "moe" in ops_of(name) else []))
    patched = worker.Run(replace(plan, include=include))
    losses = [patched.step()[0] for _ in range(2)]
    assert losses == pytest.approx([loss for loss, _ in expected], abs=1e-4)
    report = patched.report()
    assert {row.op for row in report.patched} == {*include}
    assert all(row.served and not row.fallbacks for row in report if _is_called(row))
    restored = patched.end()
    assert restored.keys() >= {row.site for row in report}
    assert all(restored.values())


def _is_called(row: Any) -> bool:
    # Qwen3-MoE has no dense MLP, unless its config asks for some, and nothing is generated.
    return not row.site.endswith(("Qwen3MoeMLP.forward", "_for_decode"))


def test_calls_are_those_of_the_first_step() -> None:
    run = worker.Run(replace(PLAN, include=("rms_norm",)))
    run.step()
    once = [row.served for row in run.report()]
    run.step()
    run.decode()
    assert [row.served for row in run.report()] == once == [2 * SHORT.layers + 1]
    run.end()


def test_both_runs_decode_the_same_bytes_and_go_on_training() -> None:
    eager = worker.Run(PLAN)
    before, _ = eager.step()
    expected, seconds = eager.decode()
    assert len(expected) == worker.NEW and seconds > 0
    after, _ = eager.step()
    patched = worker.Run(replace(PLAN, include=TORCH))
    losses = [patched.step()[0]]
    assert patched.decode()[0] == expected
    losses.append(patched.step()[0])
    assert losses == pytest.approx([before, after], abs=1e-4)
    patched.end()


def test_the_fused_loss_needs_less_memory_than_all_logits() -> None:
    if not memory.resets("cpu"):
        assert worker.Run(PLAN).loss_memory() is None
        return
    size = replace(SHORT, loss_tokens=512)
    eager = worker.Run(replace(PLAN, size=size)).loss_memory()
    patched = worker.Run(replace(PLAN, size=size, include=("rms_norm",)))
    fused = patched.loss_memory()
    logits = 512 * models.REAL_VOCABULARY * 4
    assert eager is not None and fused is not None
    assert fused < 0.6 * eager
    assert eager > 1.5 * logits
    assert all(patched.end().values())


def test_a_loss_that_does_not_fit_is_told_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(worker, "build_for_loss", full)
    monkeypatch.setattr(memory, "resets", lambda device: True)
    assert worker.Run(PLAN).loss_memory() == math.inf
    assert telling._mib(math.inf) == "more than there is"
    assert "not measurable here" in telling._mib(None)


def test_a_run_stays_as_it_is_in_a_process_that_is_patched() -> None:
    hf_kernel_patch.patch_transformers("rms_norm", models="llama")
    assert not worker.Run(PLAN).report().rows


def test_weights_follow_the_seed_and_models_of_accelerators_are_larger() -> None:
    def weights(seed: int, dtype: str) -> torch.Tensor:
        model = models.build("qwen3", SHORT, seed, "cpu", dtype)
        assert type(model).__module__ == "transformers.models.qwen3.modeling_qwen3"
        assert model.training
        return model.get_input_embeddings().weight

    first = weights(3, "float32")
    assert torch.equal(weights(3, "float32"), first)
    assert torch.equal(weights(3, "bfloat16"), first.bfloat16())
    assert not torch.equal(weights(4, "float32"), first)
    assert models.size_on("cpu") == models.SMALL
    assert models.size_on("cuda") == models.size_on("npu") == models.LARGE


@pytest.mark.parametrize("name", models.MODELS)
def test_models_of_accelerators_have_a_hundred_million_parameters_or_some_more(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name, models.LARGE, 0, "meta", "bfloat16")
    assert 1e8 < model.num_parameters() < 4e8
    assert models.LARGE.length >= worker.PROMPT + worker.NEW


def test_a_run_in_the_dtype_of_accelerators_learns_and_decodes() -> None:
    run = worker.Run(replace(PLAN, dtype="bfloat16", steps=3, include=TORCH))
    losses = [run.step()[0] for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(259), abs=1)
    assert losses[-1] < losses[0]
    assert len(run.decode()[0]) == worker.NEW
    assert all(row.served for row in run.report() if _is_called(row))
    assert all(run.end().values())


def test_peak_of_memory_sees_what_is_freed_again() -> None:
    before = memory.reset("cpu")
    block = bytearray(b"1") * (1 << 28)
    del block
    assert memory.peak("cpu") - before > 0.9 * (1 << 28)
