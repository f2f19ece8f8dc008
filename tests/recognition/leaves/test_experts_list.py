"""The lists of experts of transformers 4: every expert is looked at, unchosen ones stay alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hf_kernel_patch
from tests.support.tiny import (
    TRANSFORMERS_5,
    error,
    largest_error,
    outputs_and_gradients,
    tiny_model,
    tokens,
)

pytestmark = pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 stacks its experts")
NAMES = ("qwen3_moe", "mixtral", "deepseek_v3")


def experts_of(model: Any) -> Any:
    """The last block's experts."""
    return [one for one in model.modules() if isinstance(getattr(one, "experts", None), nn.Module)][
        -1
    ].experts


def linears(expert: Any) -> list[str]:
    """The names of gate, up and down."""
    return ["w1", "w3", "w2"] if hasattr(expert, "w1") else ["gate_proj", "up_proj", "down_proj"]


def another_activation(expert: Any) -> None:
    expert.act_fn = nn.ReLU()


def a_hook_on_the_activation(expert: Any) -> None:
    expert.act_fn.register_forward_hook(lambda module, inputs, output: output * 2)


def a_forward_of_a_subclass(expert: Any) -> None:
    cls = type(expert)
    expert.__class__ = type("Mine", (cls,), {"forward": lambda self, x: cls.forward(self, x) * 3})


def half_as_wide(expert: Any) -> None:
    for name in linears(expert):
        weight = getattr(expert, name).weight
        half = weight.chunk(2, dim=int(name in ("w2", "down_proj")))[0].detach().clone()
        linear = nn.Linear(*half.shape[::-1], bias=False)
        linear.weight = nn.Parameter(half)
        setattr(expert, name, linear)


CHANGES: list[tuple[Callable[[Any], None], str]] = [
    (another_activation, "the activation ReLU has no fused form"),
    (a_hook_on_the_activation, "a hook on the activation needs the original"),
    (a_forward_of_a_subclass, "an expert is wrapped"),
    (half_as_wide, "the experts differ in activation or size"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[row[0].__name__ for row in CHANGES])
def test_an_expert_unlike_the_first_is_the_original_s(
    name: str, change: Callable[[Any], None], reason: str
) -> None:
    model = tiny_model(name)
    change(experts_of(model)[1])
    eager = model(tokens()).logits
    with hf_kernel_patch.patched("torch_fused_moe", models=name, strict=True) as report:
        assert error(model(tokens()).logits, eager) < 1e-6
    assert [reason in found for row in report for found in row.fallbacks] == [True]


@pytest.mark.parametrize("name", NAMES)
def test_somebody_s_forward_of_the_experts_class_is_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    cls = type(experts_of(model)[0])
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *x: forward(self, *x) * 3)
    eager = model(tokens()).logits
    with hf_kernel_patch.patched("torch_fused_moe", models=name, strict=True) as report:
        assert torch.equal(model(tokens()).logits, eager)
    assert [list(row.fallbacks) for row in report] == [
        ["an expert is wrapped, hooked or has a bias"]
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["global", "model"])
def test_experts_whose_own_forward_is_ours_are_served(name: str, scope: str) -> None:
    model = tiny_model(name)
    eager = outputs_and_gradients(model)
    with hf_kernel_patch.patched("swiglu,moe" if scope == "global" else None, models=name):
        if scope == "model":
            hf_kernel_patch.apply_default_kernels(model, "torch_fused_swiglu,torch_fused_moe")
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
        (row,) = [row for row in hf_kernel_patch.status() if row.op == "moe"]
        assert row.served and not row.fallbacks
    hf_kernel_patch.unpatch(model)


def clip(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.clamp(-1e-3, 1e-3)


def clip_gradients(model: Any) -> None:
    for parameter in model.parameters():
        parameter.register_hook(clip)


def step_in_backward(model: Any) -> None:
    def step(parameter: torch.Tensor) -> None:
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.grad = clip(parameter.grad)
        optimizer.step()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hook", [clip_gradients, step_in_backward])
def test_hooks_on_weights_are_called_for_chosen_experts_alone(
    name: str, hook: Callable[[Any], None]
) -> None:
    ids = torch.tensor([[5, 5, 5]])  # which leave most experts without a token

    def trained() -> dict[str, torch.Tensor]:
        model = tiny_model(name)
        hook(model)
        model(ids, labels=ids).loss.backward()
        state = dict(model.named_parameters())
        return state | {f"{n} grad": p.grad for n, p in state.items() if p.grad is not None}

    eager = trained()
    with hf_kernel_patch.patched("torch_fused_moe", models=name, strict=True) as report:
        assert largest_error(trained(), eager) == 0
    assert [list(row.fallbacks) for row in report] == [["a hook on an expert's weight"]]


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_leaves_unchosen_experts_alone_as_without_a_patch(name: str) -> None:
    def trained() -> tuple[dict[str, torch.Tensor], set[str]]:
        model = tiny_model(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for number in (5, 5, 7):
            ids = torch.full((1, 3), number)
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        states = {
            f"{own} {key}": value
            for own, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        left = {own for own, one in model.named_parameters() if one not in optimizer.state}
        return {**dict(model.named_parameters()), **states}, left

    eager, alone = trained()
    assert any("experts" in own for own in alone)
    with hf_kernel_patch.patched("torch_fused_moe", models=name, strict=True) as report:
        inside, left = trained()
    assert left == alone
    assert all(row.served and not row.fallbacks for row in report)
    assert largest_error(inside, eager) < 1e-4
