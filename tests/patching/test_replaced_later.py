"""What fused code takes the place of, and somebody replaces while a patch is in force."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import hf_kernel_patch
from hf_kernel_patch import KernelPatchWarning
from tests.support.probes import fallbacks, llama, logits, served
from tests.support.tiny import TRANSFORMERS_5, modelling, outputs_and_gradients, tiny_model

# architecture, op, where the function stands in the modelling module, reason of the fallback
HELPERS = [
    ("llama", "rope", "rotate_half", "rotate_half was replaced by"),
    ("qwen3", "qk_norm_rope", "rotate_half", "rotate_half of the rotary function was replaced"),
    ("qwen3", "qk_norm_rope", "apply_rotary_pos_emb", "no leaf rope.full or rope.partial"),
    ("gemma2", "rms_norm", "Gemma2RMSNorm._norm", "_norm was replaced by"),
    ("gemma2", "add_rms_norm", "Gemma2RMSNorm._norm", "is not a norm of a known leaf"),
]


def globally(model: Any, name: str, op: str) -> None:
    hf_kernel_patch.patch_transformers(op, models=name, backend="torch", strict=True)


def alone(model: Any, name: str, op: str) -> None:
    hf_kernel_patch.apply_default_kernels(model, op)


@pytest.mark.parametrize("scope", [globally, alone])
@pytest.mark.parametrize(("name", "op", "helper", "reason"), HELPERS)
def test_a_helper_that_is_replaced_later_runs_and_is_named(
    name: str,
    op: str,
    helper: str,
    reason: str,
    scope: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, module = tiny_model(name).eval(), modelling(name)
    owner, _, attribute = helper.rpartition(".")
    holder = getattr(module, owner) if owner else module
    original = getattr(holder, attribute)

    def doubled(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        return tuple(2 * x for x in found) if isinstance(found, tuple) else 2 * found

    monkeypatch.setattr(holder, attribute, doubled)
    expected = logits(model)
    monkeypatch.undo()
    plain = logits(model)
    assert not torch.equal(expected, plain)
    hf_kernel_patch.count_calls()
    scope(model, name, op)
    torch.testing.assert_close(logits(model), plain)
    calls = served(hf_kernel_patch.status())
    assert calls
    monkeypatch.setattr(holder, attribute, doubled)
    torch.testing.assert_close(logits(model), expected)
    assert any(reason in why for why in fallbacks(hf_kernel_patch.status()))
    assert served(hf_kernel_patch.status()) == calls
    monkeypatch.undo()
    torch.testing.assert_close(logits(model), plain)
    assert served(hf_kernel_patch.status()) == 2 * calls
    hf_kernel_patch.unpatch()


def test_accelerate_s_hooks_that_are_taken_off_leave_nothing_of_ours() -> None:
    model = tiny_model("llama").eval()
    eager = logits(model)
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    hf_kernel_patch.apply_default_kernels(model, "rms_norm,swiglu")
    twin = copy.deepcopy(model)
    hf_kernel_patch.count_calls()
    for module in model.modules():
        remove_hook_from_module(module)
    report = hf_kernel_patch.status()
    hf_kernel_patch.unpatch(model)
    before = served(report)
    torch.testing.assert_close(logits(model), eager)
    assert served(report) == before
    hf_kernel_patch.unpatch(twin)


@pytest.mark.parametrize("alone", [False, True])
def test_a_model_with_hooks_over_the_patch_is_copied(alone: bool) -> None:
    """accelerate's hooks copy the attributes of the forward that they wrap."""
    model = tiny_model("llama").eval()
    eager = logits(model)
    if alone:
        hf_kernel_patch.apply_default_kernels(model, "rms_norm,swiglu")
    else:
        hf_kernel_patch.patch_transformers("rms_norm,swiglu", models="llama", backend="torch")
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits(twin), eager)
    hf_kernel_patch.unpatch()
    torch.testing.assert_close(logits(copy.deepcopy(twin)), eager)


def test_a_copy_is_made_of_what_the_model_runs_whatever_its_class_runs_by_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama").eval()
    eager = logits(model)
    hf_kernel_patch.apply_kernel("torch_fused_swiglu", model=model)
    own = llama().LlamaMLP.forward

    @functools.wraps(own)
    def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * own(self, x)

    monkeypatch.setattr(llama().LlamaMLP, "forward", doubled)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits(twin), eager)
    hf_kernel_patch.unpatch()
    expected = logits(model)
    assert not torch.equal(expected, eager)  # the class's new forward
    assert torch.equal(logits(twin), expected)


def recomputations(model: Any) -> int:
    """How often a step calls the first layer's query projection: twice where it is checkpointed."""
    calls: list[int] = []
    query = model.model.layers[0].self_attn.q_proj
    handle = query.register_forward_hook(lambda *_: calls.append(1))
    outputs_and_gradients(model)
    handle.remove()
    return len(calls)


def wrap(layer: Any) -> None:
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.skipif(not TRANSFORMERS_5, reason="layers of transformers 4 ask for no such thing")
@pytest.mark.parametrize("first", ["patch", "wrapper"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_layer_whose_forward_somebody_wraps_goes_on_recomputing(first: str, alone: bool) -> None:
    """transformers' layers recompute only while the class's forward is the one that they are."""
    model = tiny_model("gemma2").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert recomputations(model) == 2
    if first == "wrapper":
        wrap(model.model.layers[0])
    for _ in range(1 if alone else 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KernelPatchWarning)  # that it is not reached
            if alone:
                hf_kernel_patch.apply_kernel("torch_fused_add_rmsnorm", model=model)
            else:
                hf_kernel_patch.patch_transformers("add_rms_norm", models="gemma2", backend="torch")
        assert recomputations(model) == 2
        if first == "patch":
            wrap(model.model.layers[0])
            assert recomputations(model) == 2
        (row,) = hf_kernel_patch.status()
        assert row.outcome == "shadowed"
        hf_kernel_patch.unpatch()
        assert recomputations(model) == 2
