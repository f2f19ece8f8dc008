"""Whole layers: the residual's sum with the norm after it, and attention with normalised heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kernel_patch
from tests.support.tiny import (
    having,
    largest_error,
    layer_ops_of,
    modelling,
    outputs_and_gradients,
    tiny_model,
    tokens,
)

ADD, HEADS = "torch_fused_add_rmsnorm", "torch_fused_qk_norm_rope"


def reasons(report: Any, op: str) -> set[str]:
    return {reason for row in report if row.op == op for reason in row.fallbacks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, ADD) for name in having("add_rms_norm")]
    + [(name, HEADS) for name in having("qk_norm_rope")],
)
def test_a_layer_is_bit_for_bit_the_original_s(name: str, kernel: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype).eval()
    with torch.no_grad():
        eager = model(tokens(), output_hidden_states=True)
        with hf_kernel_patch.patched(kernel, models=name, strict=True) as report:
            found = model(tokens(), output_hidden_states=True)
    assert torch.equal(found.logits, eager.logits)
    assert all(map(torch.equal, found.hidden_states, eager.hidden_states))
    (row,) = report
    patched = row.site.split(".")[-2]
    sites = [module for module in model.modules() if type(module).__name__ == patched]
    assert row.served == len(sites) >= 1 and not row.fallbacks


@pytest.mark.parametrize("name", having("add_rms_norm"))
def test_generate_gives_the_same_tokens(name: str) -> None:
    model = tiny_model(name).eval()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(tokens(), **options)
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True):
        assert torch.equal(model.generate(tokens(), **options), eager)


@pytest.mark.parametrize("place", ["post_attention_layernorm", "self_attn.q_norm"])
def test_a_hook_on_a_norm_inside_still_runs(place: str) -> None:
    model = tiny_model("qwen3").eval()
    layer = model.model.layers[0]
    eager = model(tokens()).logits
    calls: list[int] = []
    handle = layer.get_submodule(place).register_forward_hook(
        lambda module, args, output: calls.append(1)
    )
    with hf_kernel_patch.patched((ADD, HEADS), models="qwen3", strict=True) as report:
        assert torch.equal(model(tokens()).logits, eager)
    handle.remove()
    assert calls == [1]
    op = "qk_norm_rope" if "q_norm" in place else "add_rms_norm"
    assert reasons(report, op) == {"a hook on the norm needs the original"}


def test_a_norm_of_another_class_is_left_to_itself() -> None:
    class Doubled(modelling("llama").LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    model = tiny_model("llama").eval()
    norm = model.model.layers[1].post_attention_layernorm
    norm.__class__ = Doubled
    eager = model(tokens()).logits
    with hf_kernel_patch.patched((ADD, "rms_norm"), models="llama", strict=True) as report:
        assert torch.equal(model(tokens()).logits, eager)
    assert reasons(report, "add_rms_norm") == {"Doubled is not a norm of a known leaf"}


def test_arguments_by_position_and_the_inactive_replacement() -> None:
    model = tiny_model("llama").eval()
    layer = model.model.layers[0]
    x = torch.randn(2, 5, 64)
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    mask = torch.zeros(2, 1, 5, 5)
    eager = layer(x, mask, position_embeddings=angles)
    with hf_kernel_patch.patched(ADD, models="llama", strict=True):
        captured = type(layer).forward
        found = layer(x, mask, None, position_embeddings=angles)
    compare = torch.equal if torch.is_tensor(eager) else lambda a, b: torch.equal(a[0], b[0])
    assert compare(found, eager)
    assert compare(captured(layer, x, mask, position_embeddings=angles), eager)


def test_a_class_of_layers_made_from_the_table_s_is_reached_and_given_back() -> None:
    """As FSDP2 makes them; transformers 5.23 wraps the forward of every such class anew."""
    base = modelling("llama").LlamaDecoderLayer
    kind = type("FSDPLlamaDecoderLayer", (base,), {})
    before = vars(kind).get("forward"), base.forward
    model = tiny_model("llama").train()
    eager = outputs_and_gradients(model)
    for layer in model.model.layers:
        layer.__class__ = kind
    with hf_kernel_patch.patched(ADD, models="llama", strict=True) as report:
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
        (row,) = report
        assert row.served == 2
    assert (vars(kind).get("forward"), base.forward) == before


def test_one_model_keeps_its_checkpoints_and_no_other_is_touched() -> None:
    model, other = tiny_model("qwen3").train(), tiny_model("qwen3").train()
    eager = outputs_and_gradients(model)
    hf_kernel_patch.apply_default_kernels(model, "add_rms_norm,qk_norm_rope,rope,rms_norm")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert largest_error(outputs_and_gradients(model), eager) < 3e-6
    rows = {row.op: row for row in hf_kernel_patch.status()}
    assert rows["add_rms_norm"].served == rows["qk_norm_rope"].served == 4  # twice a layer
    assert largest_error(outputs_and_gradients(other), eager) == 0
    hf_kernel_patch.unpatch(model)
    assert type(model.model.layers[0]) is type(other.model.layers[0])


def test_a_class_made_from_one_model_s_class_is_reached_when_that_model_is_given_back() -> None:
    """As FSDP2 makes it; only where transformers wraps every such class has it a forward."""
    model = tiny_model("llama").eval()
    hf_kernel_patch.apply_kernel(ADD, model=model)
    layers = model.model.layers
    before = type(layers[0])
    kind = type("FSDPLlamaDecoderLayer", (before,), {})
    for layer in layers:
        layer.__class__ = kind
    with pytest.raises(hf_kernel_patch.ForeignPatchError, match="FSDPLlamaDecoderLayer"):
        hf_kernel_patch.unpatch()
    eager = model(tokens()).logits
    with hf_kernel_patch.patched(ADD, models="llama", strict=True) as report:
        assert torch.equal(model(tokens()).logits, eager)
    assert [row.served for row in report] == [2 if "forward" in vars(kind) else 0]
