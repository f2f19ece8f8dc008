"""Kinds of models: what can be measured of each, and what is told where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import T5Config, T5ForConditionalGeneration

import hf_kernel_patch
from hf_kernel_patch import KernelPatchError, apply_default_kernels, bench
from tests.benchmarking.benches import batch, measured
from tests.support.probes import MOE, NORM, ROPE
from tests.support.tiny import tiny_model, tokens


def test_a_model_with_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config)
    found = measured(model, include=NORM)
    assert found.workloads == ("training", "decoding")
    assert found.title.startswith("LlamaForCausalLM with an adapter, 2 layers")
    assert {one.requires_grad for one in model.parameters()} == {True, False}


def test_layers_under_hooks_of_accelerate_are_served() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp, ModelHook())
    found = measured(model, include="swiglu", decode=0)
    assert found.served == {"training": {"swiglu": 2}}


def test_an_encoder_decoder_reads_both_sides() -> None:
    config = T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, pad_token_id=0
    )
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config)
    given = {"input_ids": tokens(2, 17), "labels": tokens(2, 5)}
    found = measured(model, given, include="rms_norm", models="t5", decode=3)
    assert found.row("training", "patched").tokens == 2 * (17 + 5)
    assert found.row("decoding", "patched").tokens == 2 * 3
    assert found.ops == ("rms_norm",)


def test_a_mixture_of_experts_with_checkpointing_in_half_precision() -> None:
    model: Any = tiny_model("qwen3_moe", torch.bfloat16)
    model.gradient_checkpointing_enable()
    found = measured(model, include=f"{MOE},{NORM}", models="qwen3_moe", decode=1)
    assert "bfloat16 on cpu" in found.title and "gradient checkpointing" in found.title
    assert {*found.served["training"]} == {"moe", "rms_norm"}
    assert not any(row.failed for row in found.rows)


def test_a_model_without_a_loss_is_only_decoded() -> None:
    ids = tokens()
    found = measured(tiny_model("llama"), {"input_ids": ids}, include=NORM)
    assert found.workloads == ("decoding",)
    assert found.unmeasured == {
        "training": "the batch has no labels, without which the model gives no loss"
    }
    assert "not measured: training: the batch has no labels" in str(found)


def test_a_frozen_model_and_one_that_does_not_generate() -> None:
    model: Any = tiny_model("llama").requires_grad_(False)
    assert "requires a gradient" in measured(model, include=NORM).unmeasured["training"]
    base = tiny_model("llama").model
    with pytest.raises(KernelPatchError, match="nothing of this model can be measured") as told:
        measured(base, {"input_ids": tokens()}, include=NORM)
    assert "the output has no loss" in str(told.value)
    assert "LlamaModel does not generate text" in str(told.value)


def test_a_hook_that_trains_in_the_backward_is_not_run() -> None:
    model: Any = tiny_model("llama")
    before = model.lm_head.weight.detach().clone()

    def train(one: torch.Tensor) -> None:
        with torch.no_grad():
            one -= one.grad

    model.lm_head.weight.register_post_accumulate_grad_hook(train)
    found = measured(model, include=NORM)
    assert "has a hook on its gradient" in found.unmeasured["training"]
    assert torch.equal(model.lm_head.weight, before)


def test_a_batch_that_the_model_refuses_is_told() -> None:
    given = batch(labels=tokens(2, 5))
    found = measured(tiny_model("llama"), given, include=NORM)
    assert "ValueError: Expected input batch_size" in found.unmeasured["training"]


def test_what_no_kernel_serves_is_an_error() -> None:
    with pytest.raises(KernelPatchError, match="no kernel serves a call of LlamaForCausalLM here"):
        measured(tiny_model("llama"), include=MOE, models="mixtral")
    with pytest.raises(KernelPatchError, match="nothing to measure: no kernel is chosen"):
        bench(tiny_model("llama"), batch(), None, progress=str)


def test_what_is_patched_already_or_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        hf_kernel_patch.patched(NORM, models="llama"),
        pytest.raises(KernelPatchError, match=r"call unpatch\(\) first"),
    ):
        bench(tiny_model("llama"), include=NORM)
    model: Any = apply_default_kernels(tiny_model("llama"), NORM)
    with pytest.raises(KernelPatchError, match=r"call unpatch\(\) first"):
        bench(tiny_model("llama"), include=NORM)
    hf_kernel_patch.unpatch(model)
    with pytest.raises(ValueError, match="the model is compiled; give the one"):
        bench(torch.compile(model), include=NORM)
    model.model.layers[0].compile()
    with pytest.raises(ValueError, match="the model is compiled; give the one"):
        bench(model, include=NORM)
    with torch.device("meta"):
        empty = tiny_model("llama")
    with pytest.raises(ValueError, match="meta device"):
        bench(empty, include=NORM)
    monkeypatch.setenv("HF_KERNEL_PATCH_DISABLE", "1")
    with pytest.raises(KernelPatchError, match="HF_KERNEL_PATCH_DISABLE is set"):
        bench(tiny_model("llama"), include=NORM)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": 3}, TypeError, "expected a transformers PreTrainedModel"),
        ({"batch": torch.ones(2)}, TypeError, "maps the names of the forward's arguments"),
        ({"rounds": 0}, ValueError, "rounds is a number of at least 1, not 0"),
        ({"rounds": True}, ValueError, "rounds is a number of at least 1, not True"),
        ({"decode": -1}, ValueError, "decode is a number of at least 0, not -1"),
        ({"train": False, "decode": 0}, ValueError, "neither train nor decode"),
        ({"include": "rms_nrm"}, ValueError, "did you mean 'rms_norm'"),
    ],
)
def test_what_does_not_work_is_told_before_anything_runs(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    given = {"model": tiny_model("llama"), "batch": batch(), "include": f"{NORM},{ROPE}"}
    with pytest.raises(error, match=words):
        bench(**{**given, **arguments}, progress=pytest.fail)
