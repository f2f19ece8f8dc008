"""What has to stay as it is inside of a layer whose decoding is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hf_kernel_patch
from hf_kernel_patch.recognition.rules.decoding.parts import Parts
from tests.support.tiny import modelling, tiny_model, tokens


@pytest.fixture
def layer() -> Any:
    return tiny_model("llama").eval().model.layers[0]


def hook(layer: Any) -> None:
    layer.mlp.up_proj.register_forward_hook(lambda *args: None)


def own_forward(layer: Any) -> None:
    layer.self_attn.o_proj.forward = lambda x: x


def swapped(layer: Any) -> None:
    layer.mlp.up_proj = nn.Linear(64, 96, bias=False)


def other_weight(layer: Any) -> None:
    layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(96, 64))


def moved_weight(layer: Any) -> None:
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.clone()


def other_class(layer: Any) -> None:
    layer.mlp.up_proj.__class__ = type("Mine", (nn.Linear,), {})


def part_in_training(layer: Any) -> None:
    layer.mlp.train()


CHANGES = [hook, own_forward, swapped, other_weight, moved_weight, other_class, part_in_training]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_inside_of_a_layer_is_seen(layer: Any, change: Callable[[Any], None]) -> None:
    parts = Parts(layer)
    assert parts.unchanged()
    change(layer)
    assert not parts.unchanged()


def test_the_hooks_by_which_transformers_collects_outputs_stop_no_capture() -> None:
    model = tiny_model("llama").eval()
    parts = Parts(model.model.layers[0])
    model(tokens(), output_hidden_states=True, output_attentions=True)
    assert parts.unchanged()
    assert Parts(model.model.layers[0]).why_not() is None


def test_a_patched_norm_or_rotary_function_is_seen_and_new_values_are_not(layer: Any) -> None:
    parts = Parts(layer, [(vars(modelling("llama")), "apply_rotary_pos_emb")])
    for kernel in ("rms_norm", "rope"):
        with hf_kernel_patch.patched(kernel, models="llama"):
            assert not parts.unchanged()
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)
    assert parts.unchanged()


class Quantised(torch.Tensor):
    """A weight without memory of its own."""

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function is torch.ops.aten.detach.default
        return args[0]


def test_what_cannot_be_captured_is_named(layer: Any) -> None:
    assert Parts(layer).why_not() is None
    layer.mlp.up_proj.__class__ = type("Mine", (nn.Linear,), {})
    assert "Mine" in str(Parts(layer).why_not())
    hook(layer)
    layer.mlp.up_proj.__class__ = nn.Linear
    assert "hook" in str(Parts(layer).why_not())


def test_a_weight_without_memory_of_its_own_is_named(layer: Any) -> None:
    weight = layer.mlp.up_proj.weight
    made = torch.Tensor._make_wrapper_subclass(Quantised, weight.shape, dtype=weight.dtype)
    layer.mlp.up_proj.weight = nn.Parameter(made, requires_grad=False)
    parts = Parts(layer)
    assert parts.unchanged()
    assert parts.why_not() == "a weight is a Quantised"
