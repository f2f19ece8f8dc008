"""Kernels of a user's own that patch a model in an ``apply`` of their own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from enum import StrEnum
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import hf_kernel_patch
from hf_kernel_patch import (
    BaseKernel,
    KernelPatchWarning,
    KernelUnavailableError,
    apply_default_kernels,
    apply_kernel,
    register_kernel,
    registry,
    unpatch,
)
from tests.support.probes import logits, served
from tests.support.scope import NORM, needs_pickle, same, shared, state, unchanged
from tests.support.tiny import largest_error, outputs_and_gradients, tiny_model


class DeviceType(StrEnum):
    """As the documents name devices."""

    CPU = "cpu"
    NPU = "npu"


def doubled(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """No norm, but easily told from one."""
    return 2 * self.weight * hidden_states


class Doubled(nn.Module):
    """An MLP in place of another, on its weights."""

    def __init__(self, mlp: Any):
        super().__init__()
        self.inner = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def norms(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def bind(model: Any) -> None:
    for norm in norms(model):
        norm.forward = MethodType(doubled, norm)


def swap(model: Any) -> None:
    for norm in norms(model):
        norm.__class__ = type("DoubledNorm", (type(norm),), {"forward": doubled})


def replace(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp = Doubled(layer.mlp)


def set_module(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if name.endswith(".mlp"):
            model.set_submodule(name, Doubled(module))


def set_attributes(model: Any) -> None:
    """Changes one, adds one and removes one."""
    for norm in norms(model):
        norm.variance_epsilon, norm.fused = 1e-3, True
    del model.model.layers[0].self_attn.layer_idx


def stack(model: Any) -> None:
    """New parameters and buffers in place of others, and submodules that go."""
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.gate_up = nn.Parameter(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
        mlp.register_buffer("scale", torch.ones(1))
        del mlp.gate_proj, mlp.up_proj
        layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight.detach() + 1)


def hook(model: Any) -> None:
    for norm in norms(model):
        norm.register_forward_hook(lambda module, inputs, output: output * 2)
        norm.register_forward_pre_hook(lambda module, inputs: None)


CHANGES: dict[str, Callable[[Any], None]] = {
    "binds forwards": bind,
    "takes other classes": swap,
    "replaces submodules": replace,
    "replaces submodules by name": set_module,
    "adds submodules": lambda model: model.model.add_module("extra", nn.Linear(2, 2)),
    "sets attributes": set_attributes,
    "stacks weights": stack,
    "registers hooks": hook,
    "does several at once": lambda model: [c(model) for c in (bind, replace, swap)] and None,
}


@pytest.fixture
def own() -> Iterator[Callable[..., type[BaseKernel]]]:
    """Registers kernels as the documents write them, until the test ends."""
    known = dict(registry.kernels())

    def make(
        change: Callable[[Any], None], kernel_id: str = "npu_fused_own", **members: Any
    ) -> Any:
        class Own(BaseKernel):
            _kernel_id = kernel_id
            _device = members.get("device", DeviceType.CPU)

            @classmethod
            def check_deps(cls) -> bool:
                return bool(members.get("deps", True))

            @classmethod
            def apply(cls, **kwargs: Any) -> Any:
                model = kwargs.get("model")
                if model is None:
                    raise ValueError(f"Model must be provided for {cls.__name__}.apply().")
                if not cls.check_deps():
                    raise RuntimeError("dependencies are missing")
                change(model)
                return model

        Own.__qualname__ = kernel_id
        return register_kernel(Own)

    yield make
    registry.kernels().clear()
    registry.kernels().update(known)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_own_apply_is_applied_and_undone_exactly(own: Any, change: Any) -> None:
    kernel = own(change)
    assert (kernel.kernel_id, kernel.device) == ("npu_fused_own", "cpu")
    assert "npu_fused_own" in hf_kernel_patch.get_available_kernels()
    model, twin = tiny_model("llama"), tiny_model("llama")
    before, twin_before, common = state(model), state(twin), shared("llama")
    keys, eager = list(model.state_dict()), outputs_and_gradients(model)
    assert apply_kernel("npu_fused_own", model=model) is model
    assert not same(state(model), before)
    assert same(state(twin), twin_before)
    (row,) = hf_kernel_patch.status()
    assert (row.kernel, row.scope, row.outcome) == ("npu_fused_own", "model", "patched")
    unpatch(model)
    assert same(state(model), before)
    assert list(model.state_dict()) == keys
    assert unchanged("llama", common)
    assert largest_error(outputs_and_gradients(model), eager) == 0
    assert not hf_kernel_patch.status().rows


@pytest.mark.parametrize("change", [bind, swap, replace], ids=["bind", "swap", "replace"])
def test_an_own_apply_takes_effect_and_its_copies_work(own: Any, change: Any) -> None:
    own(change)
    model = tiny_model("llama").eval()
    eager = logits(model)
    expected = copy.deepcopy(model)
    change(expected)
    apply_kernel("npu_fused_own", model=model)
    assert not torch.equal(logits(model), eager)
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(copy.deepcopy(model)), logits(expected))
    unpatch()
    assert torch.equal(logits(model), eager)


@needs_pickle
def test_a_model_with_other_submodules_pickles_with_them(own: Any) -> None:
    own(replace)
    model = apply_kernel("npu_fused_own", model=tiny_model("llama").eval())
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    unpatch()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_own_apply_that_raises_halfway_is_undone(own: Any, change: Any) -> None:
    def failing(model: Any) -> None:
        change(model)
        raise RuntimeError("injected")

    own(failing)
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(RuntimeError, match="injected"):
        apply_kernel("npu_fused_own", model=model)
    assert same(state(model), before)
    assert not hf_kernel_patch.status().rows


@pytest.mark.parametrize("change", [bind, swap, replace], ids=["bind", "swap", "replace"])
def test_own_and_shipped_kernels_together_are_undone(own: Any, change: Any) -> None:
    own(change)
    model = tiny_model("llama")
    before = state(model)
    for order in (f"{NORM},npu_fused_own", f"npu_fused_own,{NORM}"):
        apply_default_kernels(model, order)  # the shipped one first, whatever the order
        assert {row.kernel for row in hf_kernel_patch.status()} == {NORM, "npu_fused_own"}
        outputs_and_gradients(model)
        unpatch(model)
        assert same(state(model), before)


@pytest.mark.parametrize(
    ("change", "reason"), [(bind, "owns a forward"), (swap, "found no site"), (replace, None)]
)
def test_a_shipped_kernel_after_an_own_one_claims_no_site_that_it_does_not_reach(
    own: Any, change: Any, reason: str | None
) -> None:
    own(change)
    model = tiny_model("llama").eval()
    before = state(model)
    apply_kernel("npu_fused_own", model=model)
    expected = logits(model)
    with pytest.warns(KernelPatchWarning, match=reason) if reason else nullcontext():
        apply_kernel(NORM, model=model)
    hf_kernel_patch.count_calls()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert bool(served(hf_kernel_patch.status())) == (reason is None)
    unpatch(model)
    assert same(state(model), before)


def test_two_own_kernels_one_after_the_other_are_undone_together(own: Any) -> None:
    own(bind, "first")
    own(replace, "second")
    model = tiny_model("llama")
    before = state(model)
    apply_kernel("first", model=model)
    apply_kernel("second", model=model)
    assert len(hf_kernel_patch.status()) == 2
    unpatch(model)
    assert same(state(model), before)


def test_an_own_kernel_twice_is_undone_exactly(own: Any) -> None:
    own(replace)
    model = tiny_model("llama")
    before = state(model)
    for _ in range(2):
        apply_kernel("npu_fused_own", model=model)
    unpatch(model)
    assert same(state(model), before)


@pytest.mark.parametrize(
    ("members", "reason"),
    [({"deps": False}, "check_deps.. says no"), ({"device": DeviceType.NPU}, "no npu device")],
)
def test_an_own_kernel_that_cannot_run_here_says_why(own: Any, members: Any, reason: str) -> None:
    own(bind, **members)
    assert "npu_fused_own" not in hf_kernel_patch.get_available_kernels()
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(KernelUnavailableError, match=reason):
        apply_kernel("npu_fused_own", model=model)
    assert same(state(model), before)


def test_an_own_kernel_may_hand_its_work_to_the_shipped_one(own: Any) -> None:
    own(lambda model: registry.kernels()[NORM].apply(model=model))
    model = tiny_model("llama")
    before = state(model)
    apply_kernel("npu_fused_own", model=model)
    unpatch(model)
    assert same(state(model), before)
