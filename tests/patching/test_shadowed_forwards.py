"""Instances that own a forward: reached inside, or reported and never claimed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import hf_kernel_patch
from hf_kernel_patch import ForeignPatchError, KernelPatchError, KernelPatchWarning
from tests.support.probes import (
    LAYERS,
    NORM,
    ROPE,
    SWIGLU,
    changed,
    llama,
    logits,
    owned,
    places,
    same,
    served,
)
from tests.support.tiny import tiny_model


def hook_everything(model: Any) -> Any:
    """A hook of accelerate on every module."""
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    return model


HOOKED = {
    "plain hooks": hook_everything,
    "two hooks each": lambda model: (
        add_hook_to_module(hook_everything(model).model.norm, ModelHook(), append=True) and model
    ),
    "cpu_offload": lambda model: cpu_offload(model, torch.device("cpu")) or model,
    "forced hooks": lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
}


@pytest.fixture(autouse=True)
def llama_as_before() -> Iterator[None]:
    llama()
    objects = places()
    yield
    assert changed(objects) == set()


@pytest.mark.parametrize("kind", HOOKED)
def test_hooks_of_accelerate_are_reached_inside_and_come_back(kind: str) -> None:
    eager = logits(tiny_model("llama"))
    model = HOOKED[kind](tiny_model("llama"))
    before = owned(model)
    assert ("model.norm", "_old_forward") in before
    # an MLP whose activation has a hook calls that
    mlps = 0 if ("model.layers.0.mlp.act_fn", "forward") in before else 2
    assert torch.equal(logits(model), eager)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LAYERS, models="llama", strict=True) as report:
        assert torch.equal(logits(model), eager)
        assert {row.op: row.served for row in report} == {"rms_norm": 5, "rope": 2, "swiglu": mlps}
        assert sum(row.calls.total() for row in report) == 9
        assert {row.outcome for row in report} == {"patched"}
        inside = owned(model)
        assert inside["model.norm", "_old_forward"] is not before["model.norm", "_old_forward"]
        assert inside["model.norm", "forward"] is before["model.norm", "forward"]
    assert same(owned(model), before)
    assert torch.equal(logits(model), eager)
    assert served(report) == 7 + mlps


def test_nested_blocks_reach_inside_hooks_and_leave_in_order() -> None:
    model = hook_everything(tiny_model("llama"))
    before = owned(model)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(NORM, models="llama", strict=True):
        middle = owned(model)
        with hf_kernel_patch.patched((NORM, ROPE), models="llama", strict=True) as report:
            logits(model)
            assert served(report) == 7
        assert same(owned(model), middle)
    assert same(owned(model), before)


def test_hooks_added_inside_a_block_hand_over_to_the_original_after_it() -> None:
    model = tiny_model("llama")
    eager = logits(model)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched((NORM, ROPE), models="llama") as report:
        hook_everything(model)
        assert torch.equal(logits(model), eager)
        assert served(report) == 7
    assert torch.equal(logits(model), eager)
    assert served(report) == 7
    with hf_kernel_patch.patched((NORM, ROPE), models="llama", strict=True) as report:
        logits(model)
        assert served(report) == 7
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), eager)
    with hf_kernel_patch.patched(LAYERS, models="llama", strict=True) as report:
        logits(model)
        assert served(report) == 9


@pytest.mark.parametrize("hook", ["own forward", "hook of accelerate", "forward hook"])
def test_an_activation_that_does_more_than_its_class_is_called(hook: str) -> None:
    class Double(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return output * 2

    model = tiny_model("llama")
    for layer in model.model.layers:
        activation = layer.mlp.act_fn
        if hook == "own forward":
            activation.forward = lambda gate: gate * 2
        elif hook == "hook of accelerate":
            add_hook_to_module(activation, Double())
        else:
            activation.register_forward_hook(lambda module, args, output: output * 2)
    eager = logits(model)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(SWIGLU, models="llama") as report:
        assert torch.equal(logits(model), eager)
        assert served(report) == 0
        assert sum("activation" in reason for row in report for reason in row.fallbacks) == 1


def test_hooks_removed_inside_a_block_are_no_foreign_patch() -> None:
    model = hook_everything(tiny_model("llama"))
    eager = logits(model)
    with hf_kernel_patch.patched(LAYERS, models="llama", strict=True):
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model), eager)
    assert torch.equal(logits(model), eager)
    with hf_kernel_patch.patched(LAYERS, models="llama", strict=True):
        assert torch.equal(logits(model), eager)


def test_a_copy_of_a_hooked_model_made_inside_a_block_works_after_it() -> None:
    model = hook_everything(tiny_model("llama"))
    eager = logits(model)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LAYERS, models="llama", strict=True) as report:
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), eager)
        calls = served(report)
    assert torch.equal(logits(twin), eager)
    assert served(report) == calls


def arbitrary(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A forward of somebody's own."""
    return hidden_states * 2


@pytest.mark.parametrize("hooked", [False, True])
def test_an_arbitrary_own_forward_is_reported_and_not_claimed(hooked: bool) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.forward = partial(arbitrary, layer.mlp)
        layer.input_layernorm.forward = MethodType(arbitrary, layer.input_layernorm)
    if hooked:
        hook_everything(model)
    before, eager = owned(model), logits(model)
    hf_kernel_patch.count_calls()
    with pytest.warns(KernelPatchWarning, match=r"2 instances own a forward .*arbitrary of tests"):
        report = hf_kernel_patch.patch_transformers(LAYERS, models="llama")
    rows = {row.op: row for row in report}
    assert {op: row.outcome for op, row in rows.items()} == {
        "rms_norm": "shadowed",
        "rope": "patched",
        "swiglu": "shadowed",
    }
    assert f"arbitrary of {__name__}" in rows["swiglu"].reason
    assert torch.equal(logits(model), eager)
    assert {op: row.served for op, row in rows.items()} == {"rms_norm": 3, "rope": 2, "swiglu": 0}
    attribute = "_old_forward" if hooked else "forward"
    inside = owned(model)
    for name in ("mlp", "input_layernorm"):
        place = f"model.layers.0.{name}", attribute
        assert inside[place] is before[place]
    hf_kernel_patch.unpatch()
    assert same(owned(model), before)
    with pytest.raises(KernelPatchError, match="2 instances own a forward"):
        hf_kernel_patch.patch_transformers(LAYERS, models="llama", strict=True)
    assert same(owned(model), before)


def test_a_model_that_nobody_holds_any_more_is_no_reason_to_complain() -> None:
    model = tiny_model("llama")
    model.model.norm.forward = MethodType(arbitrary, model.model.norm)  # a reference cycle
    gc.disable()
    try:
        del model
        with hf_kernel_patch.patched(LAYERS, models="llama", strict=True) as report:
            assert {row.outcome for row in report} == {"patched"}
    finally:
        gc.enable()


def test_an_own_forward_that_is_the_class_s_own_is_reached() -> None:
    model = tiny_model("llama")
    model.model.norm.forward = own = model.model.norm.forward
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(NORM, models="llama", strict=True) as report:
        logits(model)
        assert served(report) == 5
        assert model.model.norm.forward is not own
    assert vars(model.model.norm)["forward"] is own


def test_a_forward_bound_to_another_instance_is_not_reached() -> None:
    model = tiny_model("llama")
    first, second = (layer.input_layernorm for layer in model.model.layers)
    first.forward = second.forward
    eager = logits(model)
    with pytest.warns(KernelPatchWarning, match="1 instances own a forward"):
        hf_kernel_patch.patch_transformers(NORM, models="llama")
    assert torch.equal(logits(model), eager)
    hf_kernel_patch.unpatch()
    assert vars(first)["forward"].__self__ is second


def test_a_foreign_forward_over_an_instance_of_ours_is_named() -> None:
    norm = llama().LlamaRMSNorm(8)
    norm.forward = norm.forward
    hf_kernel_patch.patch_transformers(NORM, models="llama")
    norm.forward = foreign = MethodType(arbitrary, norm)
    with pytest.raises(ForeignPatchError, match=r"LlamaRMSNorm instance\.forward.*arbitrary of te"):
        hf_kernel_patch.unpatch()
    assert vars(norm)["forward"] is foreign
