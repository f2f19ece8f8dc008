"""Models in unusual states: what is verified in them, and that they are as before afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import registry, verify
from hf_kernel_patch.kernels import register_kernel
from hf_kernel_patch.verifying import Verdict
from hf_kernel_patch.verifying.whole import room_for, why_no_double
from tests.support.probes import NORM, ROPE, SWIGLU
from tests.support.tiny import tiny_model, tokens

MODELLING = "transformers.models.llama.modeling_llama."
LORA = "peft.tuners.lora.layer.Linear.forward"


def batch() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens()}


def state_of(model: Any) -> dict[str, Any]:
    """Everything that a verification may not change."""
    return {
        "modes": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "attributes": [
            {key: value for key, value in vars(module).items() if isinstance(value, float | bool)}
            for module in model.modules()
        ],
        "children": [list(map(id, module.children())) for module in model.modules()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ],
        "requires": [one.requires_grad for one in model.parameters()],
        "gradients": [id(one.grad) for one in model.parameters()],
        "weights": [one.clone() for one in model.state_dict().values()],
        "buffers": [one.clone() for one in model.buffers()],
        "config": model.config.to_dict(),
        "generator": torch.get_rng_state(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def mixed_model() -> Any:
    """With dropout, a part in evaluation mode, frozen weights, gradients and checkpointing."""
    model = tiny_model("llama", attention_dropout=0.25).train()
    model.gradient_checkpointing_enable()
    model(**batch()).loss.backward()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.grad = None
    return model


def test_the_model_is_as_before() -> None:
    model = mixed_model()
    before = state_of(model)
    assert verify(model, batch(), f"{NORM},{ROPE},{SWIGLU}").ok
    after = state_of(model)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert not hf_kernel_patch.status().rows


@pytest.mark.parametrize("step", [1, 3])
def test_the_model_is_as_before_when_it_is_interrupted(step: int) -> None:
    model = mixed_model()
    before, seen = state_of(model), 0

    def interrupt(line: str) -> None:
        nonlocal seen
        seen += 1
        if seen > step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(model, batch(), NORM, progress=interrupt)
    after = state_of(model)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert not hf_kernel_patch.status().rows


def test_counting_stays_as_it_was() -> None:
    hf_kernel_patch.count_calls(False)
    verify(tiny_model("llama"), batch(), NORM, whole=False)
    with hf_kernel_patch.patched(NORM, models="llama") as report:
        tiny_model("llama")(tokens())
    assert not any(row.calls for row in report)


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.5), (torch.bfloat16, 0.0)])
def test_an_adapter_is_verified(dtype: torch.dtype, dropout: float) -> None:
    peft = pytest.importorskip("peft")
    chosen = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "up_proj"],
        init_lora_weights=False,
        lora_dropout=dropout,
    )
    model = peft.get_peft_model(tiny_model("llama", dtype), chosen)
    found = verify(model, batch(), f"torch_fused_lora,{NORM},{ROPE},{SWIGLU}")
    assert found.ok, str(found)
    rows = found.by_site()[LORA]
    assert len(rows) == 4 and {row.verdict for row in rows} == {Verdict.RIGHT}
    assert rows[0].module == "base_model.model.model.layers.0.self_attn.q_proj"
    names = {one.name for one in rows[0].measures if one.gradient}
    # Nothing that can be trained lies before the first layer's.
    assert names == {"lora_A.default.weight", "lora_B.default.weight"}
    assert set(found.by_site()) >= {f"{MODELLING}LlamaRMSNorm.forward", LORA}
    assert verify(model, batch(), "auto").ok


def test_an_adapter_s_wrong_gradient_is_named() -> None:
    peft = pytest.importorskip("peft")
    right = registry.kernels()["torch_fused_lora"]

    def wrong(*arguments: Any, **named: Any) -> torch.Tensor:
        found = right.load()(*arguments, **named)
        return found + 0.01 * (found - found.detach())

    members = {"kernel_id": "wrong_lora", "function": staticmethod(wrong)}
    register_kernel(type("WrongLora", (right,), members))
    try:
        model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
        found = verify(model, batch(), f"wrong_lora,{NORM}", whole=False)
    finally:
        del registry.kernels()["wrong_lora"]
    assert found.sites == (LORA,)
    assert all(not one.worse for row in found.rows for one in row.measures if not one.gradient)


def test_tied_weights_and_a_frozen_model() -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert verify(tied, batch(), f"{NORM},torch_fused_linear_cross_entropy").ok
    frozen = tiny_model("llama").requires_grad_(False)
    found = verify(frozen, batch(), NORM)
    assert found.ok and all(row.output and not row.gradient for row in found.rows)


def test_in_a_block_without_gradients_and_in_inference_mode() -> None:
    model = tiny_model("llama")
    for block in (torch.no_grad, torch.inference_mode):
        with block():
            found = verify(model, batch(), NORM)
        assert found.ok and all(row.gradient for row in found.rows)


def test_a_model_under_the_hooks_of_accelerate_is_verified() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("llama")
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    forwards = [vars(module)["forward"] for module in model.modules()]
    found = verify(model, batch(), f"{NORM},torch_fused_add_rmsnorm")
    assert found.ok and found.whole, str(found)
    norms = found.by_site()[f"{MODELLING}LlamaRMSNorm.forward"]
    assert {row.verdict for row in norms} == {Verdict.RIGHT}
    assert all(row.verdict is not Verdict.NOT_CHECKED for row in found.rows)
    assert all(vars(m)["forward"] is one for m, one in zip(model.modules(), forwards, strict=True))


def test_what_torch_compile_wraps_is_verified_as_it_is() -> None:
    found = verify(torch.compile(tiny_model("llama")), batch(), NORM)  # type: ignore[arg-type]
    assert found.ok and found.rows[0].module == "model.layers.0.input_layernorm"
    parallel = torch.nn.DataParallel(tiny_model("llama"))
    assert verify(parallel, batch(), NORM, whole=False).rows[0].module == found.rows[0].module
    inside = tiny_model("llama")
    inside.compile()
    kept = inside._compiled_call_impl
    assert verify(inside, batch(), NORM, whole=False).ok
    assert inside._compiled_call_impl is kept


def test_eager_without_numbers_is_nothing_to_compare_with() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    found = verify(model, batch(), f"{SWIGLU},{NORM}")
    first, second = found.by_site()[f"{MODELLING}LlamaMLP.forward"]
    assert first.verdict is Verdict.RIGHT
    assert second.verdict is Verdict.NOT_CHECKED and "is not finite" in second.reason
    assert "it cannot be run in float64" in found.note and found.ok


def test_weights_that_have_no_float64() -> None:
    model = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(128, 64, dtype=torch.int8), requires_grad=False
    )
    assert room_for(model) == (None, "weights in int8 have no float64")
    assert why_no_double(model.model.norm.parameters()) == ""
    model.lm_head.to("meta")
    assert room_for(model)[1] == "weights on the meta device have no values here"


def test_modules_with_quantised_weights_are_not_checked_and_others_are() -> None:
    model = tiny_model("llama")
    quantised = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.register_parameter("quantised", quantised)
    found = verify(model, batch(), f"{NORM},{SWIGLU}")
    first, second = found.by_site()[f"{MODELLING}LlamaMLP.forward"]
    assert first.verdict is Verdict.NOT_CHECKED and second.verdict is Verdict.RIGHT
    assert first.reason == found.note == "weights in uint8 have no float64"
    norms = found.by_site()[f"{MODELLING}LlamaRMSNorm.forward"]
    assert {row.verdict for row in norms} == {Verdict.RIGHT}
    assert "ok; 1 of 2 not checked: weights in uint8 have no float64" in str(found)


def test_a_copy_that_finds_no_room_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_kernel_patch.verifying import whole

    monkeypatch.setattr(whole, "_free", lambda device: 1000)
    found = verify(tiny_model("llama"), batch(), NORM)
    assert not found.whole and found.ok and all(row.measures for row in found.rows)
    assert "its float64 copy with all gradients needs" in found.note
    assert f"the model as a whole was not compared: {found.note}" in str(found)


@pytest.mark.versions
@pytest.mark.parametrize("name", ["t5", "gemma3", "granitemoe", "recurrent_gemma"])
def test_models_of_other_kinds_are_verified(name: str) -> None:
    from hf_kernel_patch.workload import batch_of, load

    model = load(name, device="cpu")
    found = verify(model, batch_of(model, length=12), f"{NORM},{ROPE},{SWIGLU}")
    assert found.ok and found.whole, str(found)
    reasons = {row.reason for row in found.rows if row.verdict is Verdict.NOT_CHECKED}
    assert reasons <= {"the model does not call it on this batch"}, str(found)
    assert any(row.measures for row in found.rows)
