"""One model's patch among others' wrappers: adapters, hooks, replicas, swapped classes."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model

import hf_kernel_patch
from hf_kernel_patch import (
    KernelPatchWarning,
    apply_default_kernels,
    apply_kernel,
    unpatch,
)
from tests.support.probes import logits, owned, served
from tests.support.scope import LAYERS, NORM, called, close, kinds, parts_of, same, state
from tests.support.tiny import (
    TRANSFORMERS_5,
    largest_error,
    modelling,
    outputs_and_gradients,
    tiny_model,
)

# -- PEFT

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
TARGETS = ["q_proj", "gate_proj", "down_proj"]


def adapted(model: Any) -> Any:
    """LoRA on attention and MLP, with the same weights at every call, not zero."""
    torch.manual_seed(0)
    wrapper = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))
    with torch.no_grad():
        for name, parameter in wrapper.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapper


@pytest.mark.parametrize("moment", ["before", "after", "after, by the inner model"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_lora_trains_the_same_patched_before_or_after(name: str, moment: str) -> None:
    expected = outputs_and_gradients(adapted(tiny_model(name)))
    model = tiny_model(name)
    before = kinds(model)
    if moment == "before":
        wrapper = adapted(apply_default_kernels(model, LAYERS))
    else:
        wrapper = adapted(model)
        apply_default_kernels(wrapper if moment == "after" else model, LAYERS)
    hf_kernel_patch.count_calls()
    found = outputs_and_gradients(wrapper)
    assert any("lora_A" in key for key in found)
    assert not any("norm" in key for key in found)
    assert largest_error(found, expected) < 3e-6
    assert all(row.served and not row.fallbacks for row in hf_kernel_patch.status())
    unpatch(wrapper)
    assert not {kind for kind in kinds(model) if "__hf_kernel_patch_application__" in vars(kind)}
    assert largest_error(outputs_and_gradients(wrapper), expected) == 0
    assert kinds(wrapper.unload()) == before


def test_merging_an_adapter_leaves_a_patched_model() -> None:
    model = tiny_model("llama").eval()
    before = kinds(model)
    wrapper = adapted(apply_default_kernels(model, LAYERS)).eval()
    expected = logits(wrapper)
    merged = wrapper.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    unpatch(merged)
    assert kinds(merged) == before


@pytest.mark.skipif(TRANSFORMERS_5, reason="lists of experts are of transformers 4")
def test_lora_on_experts_is_left_to_the_original() -> None:
    expected = outputs_and_gradients(adapted(tiny_model("qwen3_moe")))
    wrapper = adapted(tiny_model("qwen3_moe"))
    apply_default_kernels(wrapper, "moe")
    hf_kernel_patch.count_calls()
    assert largest_error(outputs_and_gradients(wrapper), expected) == 0
    (row,) = hf_kernel_patch.status()
    assert list(row.fallbacks) == ["an expert is wrapped, hooked or has a bias"]
    unpatch()


def test_lora_on_the_head_is_left_to_the_original() -> None:
    def build() -> Any:
        torch.manual_seed(0)
        wrapper = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["lm_head"]))
        return wrapper.train()

    expected = outputs_and_gradients(build())
    wrapper = build()
    apply_default_kernels(wrapper, "linear_cross_entropy")
    assert largest_error(outputs_and_gradients(wrapper), expected) == 0
    unpatch()


# -- accelerate


class Recording(ModelHook):
    """Counts the calls that it sees."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_hooks_of_accelerate_from_before_are_reached_inside_and_stay(name: str) -> None:
    model = tiny_model(name).eval()
    eager = logits(model)
    hooks = [add_hook_to_module(module, Recording())._hf_hook for module in parts_of(model)]
    before, forwards = state(model), owned(model)
    expected = [hook.calls for hook in hooks]
    logits(model)
    once = [hook.calls - calls for hook, calls in zip(hooks, expected, strict=True)]
    apply_default_kernels(model)
    hf_kernel_patch.count_calls()
    for hook in hooks:
        hook.calls = 0
    close(model, eager)
    assert [hook.calls for hook in hooks] == once
    for row in called():
        assert row.outcome == "patched"
        in_a_list = row.op == "moe" and not TRANSFORMERS_5  # hooked experts need the original
        assert bool(row.served) != in_a_list
    unpatch(model)
    assert same(state(model), before)
    assert owned(model).keys() == forwards.keys()
    assert torch.equal(logits(model), eager)


@pytest.mark.parametrize("unpatch_first", [True, False])
def test_hooks_of_accelerate_from_after_work_and_hand_over(unpatch_first: bool) -> None:
    model = tiny_model("llama").eval()
    eager, before = logits(model), kinds(model)
    apply_default_kernels(model, LAYERS)
    for module in parts_of(model):
        add_hook_to_module(module, Recording())
    hf_kernel_patch.count_calls()
    close(model, eager)
    assert served(hf_kernel_patch.status())
    if unpatch_first:
        unpatch(model)
        assert torch.equal(logits(model), eager)
        remove_hook_from_module(model, recurse=True)
    else:
        remove_hook_from_module(model, recurse=True)
        close(model, eager)
        unpatch(model)
    assert torch.equal(logits(model), eager)
    assert kinds(model) == before


def test_a_forward_of_somebody_else_is_reported_and_not_claimed() -> None:
    model = tiny_model("llama").eval()
    norm = model.model.norm
    norm.forward = MethodType(lambda self, x: x * self.weight, norm)
    expected, before = logits(model), state(model)
    with pytest.warns(KernelPatchWarning, match="owns a forward"):
        apply_kernel(NORM, model=model)
    (row,) = hf_kernel_patch.status()
    assert row.outcome == "shadowed"
    close(model, expected)
    unpatch(model)
    assert same(state(model), before)


# -- replicas


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_replicas_as_data_parallel_makes_them_are_served(name: str) -> None:
    norm_type = f"{'Llama' if name == 'llama' else 'Qwen3Moe'}RMSNorm"
    model = apply_default_kernels(tiny_model(name))
    for module in model.modules():
        if type(module).__name__ == norm_type:
            break
    replica = module._replicate_for_data_parallel()
    replica.weight = module.weight.detach().clone()
    x = torch.randn(3, module.weight.shape[0])
    hf_kernel_patch.count_calls()
    assert type(replica) is type(module)
    assert torch.equal(replica(x), module(x))
    assert served(hf_kernel_patch.status()) == 2
    unpatch(model)
    plain = replica(x)  # a replica lives for one forward; its site hands over to the original
    assert torch.equal(plain, getattr(modelling(name), norm_type).forward(replica, x))


class Forwarding(torch.nn.Module):
    """A wrapper as users write them: what it does not have is the inner model's."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.inner(*arguments, **options)


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))


WRAPPERS = {
    "peft": lora,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "averaged peft": lambda model: torch.optim.swa_utils.AveragedModel(lora(model)),
    "forwarding": Forwarding,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_deep_copy_of_a_wrapper_is_a_wrapper(wrap: str, when: str) -> None:
    plain = copy.deepcopy(WRAPPERS[wrap](tiny_model("llama").eval()))
    model = tiny_model("llama").eval()
    if when == "before":
        model = apply_default_kernels(model, LAYERS)
    wrapped = WRAPPERS[wrap](model)
    if when == "after":
        apply_default_kernels(wrapped, LAYERS)
    twin = copy.deepcopy(wrapped)
    assert type(twin).__name__ == type(plain).__name__
    assert [name for name, _ in twin.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(twin.state_dict()) == list(plain.state_dict())
    unpatch(wrapped)
    unpatch(twin)
    unpatch()  # the model itself, which an averaged one has copied
    assert [type(m) for m in twin.modules()] == [type(m) for m in wrapped.modules()]
