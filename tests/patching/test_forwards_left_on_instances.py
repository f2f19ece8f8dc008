"""Forwards that transformers and ``kernels`` leave on instances after a call or a conversion."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kernel_patch
from tests.support.probes import LAYERS, MOE, llama, logits, owned, same, served
from tests.support.tiny import TRANSFORMERS_5, layer_ops_of, tiny_model, tokens


@pytest.mark.skipif(TRANSFORMERS_5, reason="the versions tested from 5 on keep no forward after it")
def test_forwards_that_transformers_4_leaves_on_instances_are_reached() -> None:
    model = tiny_model("qwen3_moe", attn_implementation="eager")
    logits(model, output_router_logits=True, output_hidden_states=True, output_attentions=True)
    before = owned(model)
    blocks = {name for name, _ in before if name.endswith(".mlp")}
    assert len(blocks) == 2
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(MOE, models="qwen3_moe", strict=True) as report:
        logits(model)
        assert served(report) == 2
    assert same(owned(model), before)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("first", ["before", "inside"])
def test_recorded_outputs_agree_and_instances_come_back(name: str, first: str) -> None:
    model = tiny_model(name, attn_implementation="eager")
    options: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    if name == "qwen3_moe":
        options["output_router_logits"] = True

    def recorded() -> list[torch.Tensor]:
        with torch.no_grad():
            result = model(tokens(), **options)
        return [result.logits, *result.hidden_states, *result.attentions]

    eager = recorded() if first == "before" else []
    before = owned(model)
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True):
        inside = recorded()
    assert not eager or same(owned(model), before)
    eager = eager or recorded()
    assert len(inside) == len(eager) == 6
    for left, right in zip(inside, eager):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True):
        recorded()


def test_forwards_bound_by_kernelize_are_reached() -> None:
    kernels = pytest.importorskip("kernels", reason="needs the package kernels")
    model, rotary = tiny_model("llama"), llama().apply_rotary_pos_emb
    eager = logits(model)
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    before, bound = owned(model), vars(rotary).get("forward")
    assert ("model.norm", "forward") in before
    hf_kernel_patch.count_calls()
    try:
        with hf_kernel_patch.patched(LAYERS, models="llama") as report:
            assert torch.equal(logits(model), eager)
            counts = {row.op: row.served for row in report}
        assert same(owned(model), before)
        assert vars(rotary).get("forward") is bound
    finally:
        vars(rotary).pop("forward", None)  # all models share it
    assert counts == {"rms_norm": 5, "rope": 2, "swiglu": 2}
