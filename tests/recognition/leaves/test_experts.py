"""Experts: whose choice counts, our name in transformers' interface, experts of other ranks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import hf_kernel_patch
from hf_kernel_patch.recognition import experts_interface
from tests.recognition.leaves.experts import OURS, asked_for, experts_row, takes_names
from tests.support.probes import run_python
from tests.support.tiny import (
    TRANSFORMERS_5,
    error,
    largest_error,
    modelling,
    outputs_and_gradients,
    tiny_config,
    tiny_model,
    tokens,
)

pytestmark = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="transformers 4 has no choice of experts"
)
KNOWS_SENTINEL = Version(transformers.__version__) >= Version("5.18")


@pytest.mark.parametrize("by", ["model", "class"])
def test_decoding_keeps_the_default_where_the_experts_are_ours(by: str) -> None:
    model = tiny_model("qwen3_moe").to("meta")  # on a CPU transformers does not switch
    assert asked_for(model) == "grouped_mm"

    def inside() -> str:
        with model._optimize_model_for_decode():
            return asked_for(model)

    assert inside() == "batched_mm"
    if by == "model":
        hf_kernel_patch.apply_kernel("torch_fused_moe", model=model)
    else:
        hf_kernel_patch.patch_transformers("torch_fused_moe", models="qwen3_moe", strict=True)
    assert inside() == "grouped_mm"
    hf_kernel_patch.unpatch(model if by == "model" else None)
    assert inside() == "batched_mm"
    assert "_optimize_model_for_decode" not in vars(type(model))


def test_batched_mm_that_the_user_asked_for_is_respected_and_reported() -> None:
    model = tiny_model("qwen3_moe", experts_implementation="batched_mm")
    with hf_kernel_patch.patched(models="qwen3_moe") as report:
        model.generate(tokens(), max_new_tokens=3, do_sample=False)
    reason = "experts_implementation='batched_mm' was asked for"
    assert set(experts_row(report).fallbacks) == {reason}
    assert not experts_row(report).served


def test_generation_is_the_same_and_served_at_every_token() -> None:
    model = tiny_model("qwen3_moe")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(tokens(), **options)
    with hf_kernel_patch.patched("moe", models="qwen3_moe", strict=True) as report:
        assert torch.equal(model.generate(tokens(), **options), plain)
    assert experts_row(report).served == 2 * 4
    assert not experts_row(report).fallbacks


@takes_names
@pytest.mark.parametrize("patched", [False, True])
def test_our_name_serves_with_and_without_a_patch(patched: bool) -> None:
    eager = outputs_and_gradients(tiny_model("qwen3_moe", experts_implementation="eager"))
    model = tiny_model("qwen3_moe", experts_implementation=OURS)
    assert asked_for(model) == OURS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if patched:
            with hf_kernel_patch.patched(models="qwen3_moe") as report:
                found = outputs_and_gradients(model)
            assert experts_row(report).served == 2
        else:
            found = outputs_and_gradients(model)
    assert largest_error(found, eager) < 3e-6
    hf_kernel_patch.unpatch()
    assert largest_error(outputs_and_gradients(model), eager) < 3e-6


@takes_names
def test_our_name_can_be_set_on_a_loaded_model_and_taken_back() -> None:
    model = tiny_model("mixtral")
    plain = model(tokens()).logits
    model.set_experts_implementation(OURS)
    assert torch.allclose(model(tokens()).logits, plain, atol=1e-5)
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(model(tokens()).logits, plain)


@takes_names
def test_our_name_hands_other_layouts_to_the_default_and_says_so_once_a_reason() -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=128,
        pad_token_id=0,
        experts_implementation=OURS,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.warns(hf_kernel_patch.KernelPatchWarning, match="GptOssExperts.*=True"):
        found = model(tokens()).logits
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(found, model(tokens()).logits)


@takes_names
def test_our_name_leaves_calls_under_autocast_to_the_default() -> None:
    model = tiny_model("qwen3_moe", experts_implementation=OURS)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(hf_kernel_patch.KernelPatchWarning, match="autocast chooses"):
            found = model(tokens()).logits
        model.set_experts_implementation("grouped_mm")
        assert torch.equal(found, model(tokens()).logits)


@takes_names
def test_our_name_compiles_as_one_graph_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(experts_interface, "_site", None)
    config = tiny_config("qwen3_moe", experts_implementation=OURS)
    experts = modelling("qwen3_moe").Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    experts = experts.bfloat16()
    hidden = torch.randn(5, config.hidden_size).bfloat16()
    index, weights = torch.arange(10).view(5, 2) % 8, torch.rand(5, 2).bfloat16()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    found = compiled(hidden, index, weights)
    assert error(found, experts(hidden, index, weights)) < 1e-2


PROGRAM = """
{first}
{second}
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "hf_kernel_patch" in ALL_EXPERTS_FUNCTIONS.keys()
hf_kernel_patch.patch_transformers()
hf_kernel_patch.unpatch()
assert "hf_kernel_patch" in ALL_EXPERTS_FUNCTIONS.keys()
"""


def test_importing_the_package_alone_enters_the_name_and_it_stays() -> None:
    ours, theirs = "import hf_kernel_patch", "import transformers.integrations.moe"
    for first, second in ((ours, theirs), (theirs, ours)):
        done = run_python(PROGRAM.format(first=first, second=second))
        assert done.returncode == 0, done.stderr


def test_experts_sharded_by_fsdp2_are_served_and_train() -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model("qwen3_moe")
        plain = outputs_and_gradients(model)
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        with hf_kernel_patch.patched("moe", models="qwen3_moe", strict=True) as report:
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            found = outputs_and_gradients(model)
        assert experts_row(report).served == 2
        assert not experts_row(report).fallbacks
        found = {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in found.items()}
        assert largest_error(found, plain) < 3e-6
    finally:
        distributed.destroy_process_group()


def test_entering_the_name_twice_is_entering_it_once() -> None:
    import sys

    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before, finders = dict(ALL_EXPERTS_FUNCTIONS.items()), list(sys.meta_path)
    experts_interface.register()
    assert dict(ALL_EXPERTS_FUNCTIONS.items()) == before
    assert sys.meta_path == finders


@pytest.mark.parametrize("kernel", ["torch_fused_moe"])
def test_experts_of_other_ranks_add_nothing_and_get_no_gradient(kernel: str) -> None:
    config = tiny_config("qwen3_moe")
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    experts = modelling("qwen3_moe").Qwen3MoeExperts(config)
    experts._is_expert_parallel = True
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hidden = torch.randn(6, config.hidden_size, requires_grad=True)
    index = torch.tensor([[0, 8], [8, 3], [8, 8], [2, 1], [8, 0], [7, 8]])
    weights = torch.rand(6, 2).masked_fill(index == 8, 0).requires_grad_()

    def results() -> list[torch.Tensor]:
        out = experts(hidden, index, weights)
        leaves = [hidden, weights, *experts.parameters()]
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    with hf_kernel_patch.patched(kernel, models="qwen3_moe") as report:
        found = results()
    assert experts_row(report).served == 1
    assert not found[2][index == 8].any()
    if KNOWS_SENTINEL:
        for one, other in zip(found, results(), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
