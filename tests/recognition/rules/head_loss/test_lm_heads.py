"""Whatever owns the head: adapters, wrappers and hooks; each served or handed back, and said."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.kernels import register_kernel
from hf_kernel_patch.ops.linear_cross_entropy import CudaFusedLinearCrossEntropy
from tests.recognition.rules.head_loss.steps import agree, labels, run
from tests.support.probes import fallbacks, served
from tests.support.tiny import TRANSFORMERS_5, tiny_model, tokens

LOSS = "linear_cross_entropy"


def lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zeros, which would hide the adapter
                parameter.normal_(0, 0.1)
    return wrapped


def hooked(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    return model


def hooked_before(model: Any) -> Any:
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    return model


def hooked_behind(model: Any) -> Any:
    double = lambda module, grads, _: tuple(g if g is None else 2 * g for g in grads)  # noqa: E731
    model.lm_head.register_full_backward_hook(double)
    return model


def prompted(model: Any) -> Any:
    torch.manual_seed(5)
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(model, tuning)


def offloaded(model: Any) -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model.lm_head, ModelHook())
    return model


def normed(model: Any) -> Any:
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def sharded_by_deepspeed(model: Any) -> Any:
    model.lm_head.weight.ds_id = 7
    return model


class Quantised(torch.Tensor):
    """As the weight of a quantised head: another kind of tensor in a parameter."""


def quantised_head(model: Any) -> Any:
    weight = model.lm_head.weight.detach().as_subclass(Quantised)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def weight_that_is_no_parameter(model: Any) -> Any:
    weight = model.lm_head.weight.detach()
    del model.lm_head._parameters["weight"]
    model.lm_head.weight = weight
    return model


OWNERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "LoRA of the attention": (lambda model: lora(model, target_modules=["q_proj"]), ""),
    "LoRA of the head": (
        lambda model: lora(model, target_modules=["lm_head"]),
        "is a peft.tuners.lora.layer.Linear",
    ),
    "a head to save": (
        lambda model: lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "ModulesToSaveWrapper",
    ),
    "prompt tuning": (prompted, ""),
    "a hook": (hooked, "a hook on the head"),
    "a hook before": (hooked_before, "a hook on the head"),
    "a hook behind": (hooked_behind, "a hook on the head"),
    "accelerate's hook": (offloaded, "a hook on the head"),
    "ZeRO-3": (sharded_by_deepspeed, "DeepSpeed ZeRO-3"),
    "a quantised weight": (quantised_head, "a tensor is a Quantised"),
    "a weight that is no parameter": (weight_that_is_no_parameter, "not a parameter"),
    "a parametrised weight": (normed, "ParametrizedLinear"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("owner", OWNERS)
def test_every_owner_of_the_head_is_heard(owner: str) -> None:
    own, reason = OWNERS[owner]
    model = own(tiny_model("llama", tie_word_embeddings=False)).train()
    options = {"labels": labels(), "use_cache": False}
    eager = run(model, **options)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True) as report:
        inside = run(model, **options)
    agree(inside, eager)
    assert served(report) == (not reason)
    assert all(reason in found for found in fallbacks(report))
    assert bool(fallbacks(report)) == bool(reason)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_see_the_head(kind: str) -> None:
    model = tiny_model("llama").train()
    seen: list[Any] = []
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *_: seen.append(module) if module is model.lm_head else None)
    try:
        with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
            model(tokens(), labels=labels()).loss.backward()
    finally:
        handle.remove()
    assert seen == [model.lm_head]


def test_linear_layers_with_a_foreign_forward_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 1.5 * forward(self, x))
    model = tiny_model("llama").train()
    eager = run(model, labels=labels())
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True) as report:
        agree(run(model, labels=labels()), eager)
    assert set(fallbacks(report)) == {f"the forward of all linear layers is {__name__}'s"}


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 asks meta for its autocast too")
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_model_without_memory_runs_its_own_code(name: str) -> None:
    model = tiny_model(name, torch.bfloat16).train().to("meta")
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("auto", models=name) as report:
        ids = tokens().to("meta")
        assert model(ids, labels=ids).loss.shape == ()
    assert not served(report)


@pytest.fixture
def here() -> Iterator[str]:
    """The kernel in Triton on this device, under an id of its own."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device, or Triton's interpreter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    members = {"kernel_id": "loss_here", "device": device}
    members["check_deps"] = classmethod(lambda cls: None)
    register_kernel(type("Here", (CudaFusedLinearCrossEntropy,), members))
    yield "loss_here"
    del registry.kernels()["loss_here"]


# The loop over the experts of transformers 4 does not compile into one graph.
COMPILED = ["llama", "gemma2", "granite", *["qwen3_moe"] * TRANSFORMERS_5]


@pytest.mark.parametrize("name", COMPILED)
def test_a_whole_step_compiles_into_one_graph_and_its_logits_are_lazy(name: str, here: str) -> None:
    device = registry.kernels()[here].device
    model = tiny_model(name, num_hidden_layers=1).train().to(device)
    ids = tokens().to(device)
    options = {"labels": labels().to(device), "use_cache": False}
    eager = run(model, ids, **options)
    torch._dynamo.reset()
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(here, models=name, strict=True) as report:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        model.zero_grad()
        output = compiled(ids, **options)
        assert not isinstance(vars(output)["logits"], torch.Tensor)
        output.loss.backward()
    torch.testing.assert_close(output.loss, eager["loss"])
    assert torch.equal(output.logits, eager["logits"])
    for parameter, gradient in zip(
        [p for p in model.parameters() if p.grad is not None],
        [value for key, value in eager.items() if "gradient" in key],
        strict=True,
    ):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert fallbacks(report) == Counter()


def test_logits_are_read_within_a_compiled_step(here: str) -> None:
    device = registry.kernels()[here].device
    model = tiny_model("llama", num_hidden_layers=1).train().to(device)
    ids = tokens().to(device)

    def step() -> tuple[Any, Any]:
        output = model(ids, labels=ids, use_cache=False)
        return output.loss, output.logits.argmax(-1)

    eager = step()
    torch._dynamo.reset()
    with hf_kernel_patch.patched(here, models="llama", strict=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")()
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_compiled_step_within_accelerate_s_mixed_precision(here: str) -> None:
    from accelerate.utils import convert_outputs_to_fp32

    device = registry.kernels()[here].device
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=1).train().to(device)
    ids = tokens().to(device)
    options = {"labels": ids, "use_cache": False}
    metrics = {LOSS: {"metrics": True}}
    eager = convert_outputs_to_fp32(model.forward)(ids, **options)
    torch._dynamo.reset()
    with hf_kernel_patch.patched(here, models="llama", strict=True, options=metrics):
        converted = convert_outputs_to_fp32(model.forward)
        inside = torch.compile(converted, fullgraph=True, backend="aot_eager")(ids, **options)
        plain = converted(ids, **options)
    for found in (inside, plain):
        torch.testing.assert_close(found.loss, eager.loss, rtol=1e-3, atol=1e-3)
        assert found.logits.dtype is torch.float32
        torch.testing.assert_close(found.logits, eager.logits)
        assert 0 <= found.token_accuracy <= 1 < found.mean_entropy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_labels_may_be_on_another_device_than_the_model() -> None:
    model = tiny_model("llama").train().cuda()
    ids = tokens().cuda()
    eager = run(model, ids, labels=labels(), num_items_in_batch=torch.tensor(9))
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True) as report:
        inside = run(model, ids, labels=labels(), num_items_in_batch=torch.tensor(9))
    agree(inside, eager)
    assert served(report) == 1


def test_torch_compile_sees_the_original_of_the_plain_kernel() -> None:
    model = tiny_model("llama", num_hidden_layers=1).train()
    eager = model(tokens(), labels=labels(), use_cache=False)
    torch._dynamo.reset()
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True, backend="torch") as report:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        inside = compiled(tokens(), labels=labels(), use_cache=False)
    assert torch.equal(inside.loss, eager.loss)
    assert torch.equal(inside.logits, eager.logits)
    assert set(fallbacks(report)) == {"torch.compile fuses the original itself"}
