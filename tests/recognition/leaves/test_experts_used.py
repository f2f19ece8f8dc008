"""Experts in use: saved and loaded under our name, in FP8, with adapters, in compiled blocks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_kernel_patch
from tests.recognition.leaves.experts import OURS, asked_for, experts_row, takes_names
from tests.support.moe_kernels import KERNELS, registered
from tests.support.tiny import (
    TRANSFORMERS_5,
    error,
    largest_error,
    outputs_and_gradients,
    tiny_model,
    tokens,
)

transformers_5 = pytest.mark.skipif(not TRANSFORMERS_5, reason="needs stacked experts")


@takes_names
@pytest.mark.parametrize("patched", [False, True])
def test_a_model_loads_under_our_name_and_its_checkpoint_knows_nothing_of_it(
    patched: bool, tmp_path: Path
) -> None:
    plain = tiny_model("qwen3_moe")
    wanted = plain(tokens()).logits
    plain.save_pretrained(tmp_path / "plain")
    with hf_kernel_patch.patched("moe" if patched else None, models="qwen3_moe"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", experts_implementation=OURS
        )
        assert asked_for(model) == OURS
        assert error(model(tokens()).logits, wanted) < 1e-6
        model.save_pretrained(tmp_path / "ours")
    assert error(model(tokens()).logits, wanted) < 1e-6  # and after the patch
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert asked_for(again) == "grouped_mm"
    assert torch.equal(again(tokens()).logits, wanted)
    for file in (tmp_path / "ours").iterdir():
        assert OURS.encode() not in file.read_bytes()


@takes_names
def test_experts_in_fp8_run_by_the_default_of_their_own_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.integrations import finegrained_fp8
    from transformers.integrations.moe import use_experts_implementation

    interface = finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
    # Their real default needs a kernel from the hub.
    monkeypatch.setitem(interface, "grouped_mm", lambda self, hidden, index, weights: hidden * 2)
    cls = type("FP8", (finegrained_fp8.FP8Experts,), {})
    cls = use_experts_implementation(cls, experts_interface=interface)
    sizes = {"num_local_experts": 4, "hidden_size": 32, "moe_intermediate_size": 16}
    config = SimpleNamespace(**sizes, hidden_act="silu", _experts_implementation=OURS)
    experts: Any = cls(config, block_size=(16, 16))
    hidden, index, weights = torch.randn(3, 32), torch.zeros(3, 2).long(), torch.rand(3, 2)
    with pytest.warns(hf_kernel_patch.KernelPatchWarning, match="FP8 runs by transformers"):
        assert torch.equal(experts(hidden, index, weights), hidden * 2)


@transformers_5
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("scope", ["global", "model"])
def test_adapters_on_the_stacked_weights_are_served_and_train(name: str, scope: str) -> None:
    peft = pytest.importorskip("peft")
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_parameters=stacked, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(name), config)
    eager = outputs_and_gradients(model)
    assert any("lora_A" in own for own in eager)
    with hf_kernel_patch.patched("moe" if scope == "global" else None, models=name):
        if scope == "model":
            hf_kernel_patch.apply_kernel("torch_fused_moe", model=model)
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
        row = experts_row(hf_kernel_patch.status())
        assert row.served == 2 and not row.fallbacks
        hf_kernel_patch.unpatch(model)
    assert largest_error(outputs_and_gradients(model), eager) == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_whole_block_compiles_as_one_graph_with_the_kernel_in_it(name: str) -> None:
    torch._dynamo.reset()
    block = tiny_model(name).model.layers[-1].mlp
    x = torch.randn(1, 5, 64)

    def results(function: Any) -> dict[str, torch.Tensor]:
        block.zero_grad()
        out = function(x)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        grads = {own: p.grad for own, p in block.named_parameters() if p.grad is not None}
        # In a graph an expert of a list that no token chose has a gradient of zeros.
        return {"out": out.detach()} | {own: g.clone() for own, g in grads.items() if g.any()}

    eager = results(block)
    kernel = KERNELS[1]
    with registered(kernel), hf_kernel_patch.patched(kernel, models=name, strict=True):
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        explained = torch._dynamo.explain(block)(x)
        assert "hf_kernel_patch.moe" in str(explained.graphs[0].graph)
        assert largest_error(results(compiled), eager) < 3e-6
    torch._dynamo.reset()
