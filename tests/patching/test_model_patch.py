"""The scope of one model: what it changes, what it leaves alone, and how it is given back."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import apply_default_kernels, apply_kernel, unpatch
from hf_kernel_patch.patching.ledger import ledger
from tests.support.probes import logits, watched_kernel
from tests.support.scope import (
    LAYERS,
    LOSS,
    MOE,
    NORM,
    ROPE,
    SWIGLU,
    build,
    called,
    kinds,
    same,
    shared,
    state,
    unchanged,
)
from tests.support.tiny import (
    ARCHITECTURES,
    largest_error,
    layer_ops_of,
    ops_of,
    outputs_and_gradients,
    tiny_model,
    tokens,
)

OPS = {NORM: "rms_norm", ROPE: "rope", SWIGLU: "swiglu", MOE: "moe", LOSS: "linear_cross_entropy"}
ROWS = [
    pytest.param(name, kernel_id, id=f"{name}-{kernel_id}")
    for name in ARCHITECTURES
    for kernel_id, op in OPS.items()
    if op in ops_of(name)
]


@pytest.mark.parametrize(("name", "kernel_id"), ROWS)
def test_one_kernel_on_one_model_leaves_its_twin_bit_for_bit_as_it_was(
    name: str, kernel_id: str
) -> None:
    model, twin = build(name).train(), build(name).train()
    before, twin_before, common = state(model), state(twin), shared(name)
    eager = outputs_and_gradients(twin)
    hf_kernel_patch.count_calls()
    assert apply_kernel(kernel_id, model=model) is model
    inside = outputs_and_gradients(model)
    (row,) = {row.kernel: row for row in called()}.values()
    assert row.kernel == kernel_id
    assert row.scope == "model"
    assert row.served > 0
    assert not row.fallbacks
    assert largest_error(inside, {key: eager[key] for key in inside}) < 3e-6
    assert largest_error(outputs_and_gradients(twin), eager) == 0
    assert same(state(twin), twin_before)
    assert unchanged(name, common)
    assert not same(state(model), before)
    unpatch(model)
    assert same(state(model), before)
    assert largest_error(outputs_and_gradients(model), eager) == 0
    assert not hf_kernel_patch.status().rows


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_kernels_together_agree_and_are_all_given_back(name: str) -> None:
    model = build(name)
    before, common = state(model), shared(name)
    eager = outputs_and_gradients(model)
    apply_default_kernels(model, layer_ops_of(name))
    assert {row.op for row in hf_kernel_patch.status()} == set(layer_ops_of(name))
    assert largest_error(outputs_and_gradients(model), eager) < 3e-6
    unpatch(model)
    unpatch(model)
    assert same(state(model), before)
    assert unchanged(name, common)


def test_the_same_kernel_twice_is_once() -> None:
    model = tiny_model("llama")
    before = state(model)
    apply_kernel(NORM, model=model)
    once, patched = kinds(model), state(model)
    apply_kernel(NORM, model=model)
    assert kinds(model) == once
    apply_default_kernels(model, NORM)
    assert same(state(model), patched)
    assert len(hf_kernel_patch.status()) == 1
    unpatch(model)
    assert same(state(model), before)


def test_kernels_add_up_in_any_order_and_go_together() -> None:
    expected = None
    for order in ((NORM, ROPE, SWIGLU), (SWIGLU, ROPE, NORM)):
        model = tiny_model("qwen3")
        before = state(model)
        for kernel_id in order:
            apply_kernel(kernel_id, model=model)
        found = outputs_and_gradients(model)
        assert expected is None or largest_error(found, expected) == 0
        expected = found
        unpatch(model)
        assert same(state(model), before)


def test_of_two_patched_models_the_one_given_back_leaves_the_other_patched() -> None:
    models = [tiny_model("qwen3_moe") for _ in range(3)]
    before = [state(model) for model in models]
    for model in models[:2]:
        apply_default_kernels(model)
    patched = state(models[1])
    unpatch(models[0])
    assert same(state(models[0]), before[0])
    assert same(state(models[1]), patched)
    hf_kernel_patch.count_calls()
    models[1](tokens())
    assert all(row.served for row in called())
    served = [row.served for row in hf_kernel_patch.status()]
    models[0](tokens())
    models[2](tokens())
    assert [row.served for row in hf_kernel_patch.status()] == served
    unpatch()
    assert all(same(state(model), old) for model, old in zip(models, before, strict=True))


def test_unpatch_restores_all_models_and_the_classes() -> None:
    names = ("llama", "gemma2", "qwen3_moe")
    models = [tiny_model(name) for name in names]
    before, common = [state(model) for model in models], [shared(name) for name in names]
    hf_kernel_patch.patch_transformers()
    for model in models:
        apply_default_kernels(model)
    unpatch()
    assert all(same(state(model), old) for model, old in zip(models, before, strict=True))
    assert all(unchanged(name, old) for name, old in zip(names, common, strict=True))
    unpatch()


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "global first"])
@pytest.mark.parametrize("undo_model_first", [True, False], ids=["undo model", "undo global"])
def test_global_and_model_patch_live_together(model_first: bool, undo_model_first: bool) -> None:
    model, twin = tiny_model("llama"), tiny_model("llama")
    before, common = state(model), shared("llama")
    eager = outputs_and_gradients(model)
    everywhere = hf_kernel_patch.patched("rms_norm,rope", models="llama", strict=True)
    if model_first:
        apply_default_kernels(model, f"{NORM},{ROPE},{SWIGLU}")
        everywhere.__enter__()
    else:
        everywhere.__enter__()
        apply_default_kernels(model, f"{NORM},{ROPE},{SWIGLU}")
    assert largest_error(outputs_and_gradients(model), eager) < 3e-6
    assert largest_error(outputs_and_gradients(twin), eager) < 3e-6
    hf_kernel_patch.count_calls()
    if undo_model_first:
        unpatch(model)
        assert same(state(model), before)
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
        assert all(row.served for row in hf_kernel_patch.status())
        everywhere.__exit__(None, None, None)
    else:
        everywhere.__exit__(None, None, None)
        assert unchanged("llama", common)
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
        assert all(row.served for row in hf_kernel_patch.status())
        assert largest_error(outputs_and_gradients(twin), eager) == 0
        unpatch(model)
    assert same(state(model), before)
    assert unchanged("llama", common)
    assert largest_error(outputs_and_gradients(model), eager) == 0


def test_unpatching_leaves_nothing_behind_in_sys_modules() -> None:
    model = tiny_model("llama")
    before = set(sys.modules)
    for _ in range(2):
        apply_kernel(ROPE, model=model)
        unpatch(model)
    assert set(sys.modules) == before


def test_models_that_come_and_go_leave_nothing_behind() -> None:
    before = set(sys.modules)
    for _ in range(2):
        model = apply_default_kernels(tiny_model("llama"), LAYERS)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        assert not hf_kernel_patch.status().rows
    unpatch(apply_kernel(NORM, model=tiny_model("llama")))
    left, ledger._stacks = ledger._stacks, {}
    assert not left
    assert set(sys.modules) == before


def test_another_kernel_for_the_same_op_takes_over_and_both_are_given_back() -> None:
    model = tiny_model("llama").eval()
    before, eager = state(model), logits(model)
    with watched_kernel() as watched:
        apply_kernel(NORM, model=model)
        apply_kernel(watched.kernel_id, model=model)
        assert torch.equal(logits(model), eager)
        assert watched.calls == 5
        unpatch(model)
        assert torch.equal(logits(model), eager)
        assert watched.calls == 5
    assert same(state(model), before)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_model_that_has_recorded_outputs_is_reached(name: str) -> None:
    """transformers 4.55 to 5.1 leaves forwards on instances after such a call."""
    model = tiny_model(name, attn_implementation="eager").eval()
    recorded: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
    recorded |= {"output_router_logits": True} if name == "qwen3_moe" else {}
    eager = logits(model, **recorded)
    before = state(model)
    apply_default_kernels(model)
    hf_kernel_patch.count_calls()
    torch.testing.assert_close(logits(model), eager, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model, **recorded), eager, rtol=1e-5, atol=1e-6)
    assert all(row.outcome == "patched" and row.served for row in called())
    unpatch(model)
    assert same(state(model), before)
    assert torch.equal(logits(model), eager)


def test_modules_that_two_models_share_stay_patched_for_the_other() -> None:
    first, second = tiny_model("llama").eval(), tiny_model("llama").eval()
    before = state(first), state(second)
    second.model = first.model
    shared = state(second)
    apply_kernel(NORM, model=first)
    apply_kernel(NORM, model=second)
    hf_kernel_patch.count_calls()
    unpatch(first)
    logits(second)
    (row,) = hf_kernel_patch.status()
    assert row.served == 5
    unpatch(second)
    assert same(state(second), shared)
    assert same(state(first), before[0])


def test_the_class_of_a_patched_module_builds_what_its_own_class_does() -> None:
    model = apply_kernel(NORM, model=tiny_model("llama"))
    norm = model.model.norm
    made = type(norm)(8)
    assert type(made) is type(norm).__mro__[1]
    hf_kernel_patch.count_calls()
    made(torch.randn(2, 8))
    (row,) = hf_kernel_patch.status()
    assert row.served == 0
    unpatch(model)
    assert type(made) is type(norm)


def test_another_option_takes_the_place_of_the_first() -> None:
    model = tiny_model("llama").train()
    for metrics in (False, True):
        apply_kernel("torch_fused_linear_cross_entropy", model=model, options={"metrics": metrics})
    out = model(tokens(), labels=tokens())
    assert out.token_accuracy is not None
    unpatch(model)
