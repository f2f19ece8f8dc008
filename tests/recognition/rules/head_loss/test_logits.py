"""Logits on demand are those of the forward: its gradient mode and its weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import KernelPatchWarning
from tests.recognition.rules.head_loss.steps import walked
from tests.support.tiny import tiny_model, tokens

LOSS = "linear_cross_entropy"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_are_those_of_the_forward_in_whatever_mode_they_are_read(
    mode: Callable[[], Any], pair: tuple[Any, Any], made: list[bool]
) -> None:
    inside, eager = pair
    with mode():
        assert torch.equal(inside.logits, eager.logits)
        assert inside.logits.requires_grad  # as the original's
    inside.logits.square().mean().backward()
    assert made == [True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_of_a_forward_without_gradients_need_none(mode: Callable[[], Any]) -> None:
    model = tiny_model("llama").train()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True), mode():
        inside = model(tokens(), labels=tokens())
    assert not inside.logits.requires_grad
    assert inside.logits.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(copy.deepcopy(inside).logits, inside.logits)
    assert inside.logits.numpy().shape == (2, 17, 128)


def test_what_is_written_into_logits_stays(pair: tuple[Any, Any], made: list[bool]) -> None:
    inside, _ = pair
    with torch.no_grad():
        inside.logits[..., 0] = -1e9
    assert (inside.logits[..., 0] == -1e9).all()
    assert made == [True]


def test_logits_are_of_the_weights_that_the_forward_had() -> None:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    given = {"lm_head.weight": torch.nn.Parameter(torch.randn(128, 64))}

    def both() -> list[Any]:
        call = torch.func.functional_call(model, given, (tokens(),), {"labels": tokens()})
        return [call, model(tokens(), labels=tokens())]

    eager = both()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        inside = both()
    model.lm_head = torch.nn.Linear(64, 128, bias=False)
    for ours, theirs in zip(inside, eager, strict=True):
        assert torch.equal(ours.logits, theirs.logits)


def other_weight(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def other_memory(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data * 2


def other_dtype(model: Any) -> None:
    model.to(torch.bfloat16)


def step_of(**options: Any) -> Callable[[Any], None]:
    def step(model: Any) -> None:
        torch.optim.AdamW(model.parameters(), lr=0.1, **options).step()

    return step


CHANGES = [other_weight, other_memory, other_dtype, step_of(foreach=False), step_of(fused=True)]


@pytest.mark.parametrize("change", CHANGES)
def test_logits_read_after_the_weights_have_changed_are_warned_of(
    change: Callable[[Any], None], made: list[bool]
) -> None:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        outputs = [model(tokens(), labels=tokens()) for _ in range(2)]
        outputs[0].loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs[1].logits  # noqa: B018
        change(model)
    with pytest.warns(KernelPatchWarning, match="after its weights have changed"):
        outputs[0].logits  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs[0].logits  # noqa: B018
    assert made == [True, True]


def test_optimizers_are_left_alone_once_nothing_is_patched() -> None:
    from torch.optim import optimizer

    model = tiny_model("llama").train()
    before = dict(optimizer._global_optimizer_post_hooks)
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        model(tokens(), labels=tokens())
        assert len(optimizer._global_optimizer_post_hooks) == len(before) + 1
    assert optimizer._global_optimizer_post_hooks == before


def test_a_detached_read_keeps_nothing_of_the_graph_alive_longer_than_the_output() -> None:
    import gc
    import weakref

    model = tiny_model("llama").train()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        output = model(tokens(), labels=tokens())
    hidden = weakref.ref(walked(output)[1].pending.hidden)
    assert hidden() is not None
    del output
    gc.collect()
    assert hidden() is None


def test_a_tuple_that_is_asked_for_has_loss_and_logits(made: list[bool]) -> None:
    model = tiny_model("llama").train()
    eager = model(tokens(), labels=tokens(), return_dict=False)
    with hf_kernel_patch.patched("linear_cross_entropy", models="llama", strict=True) as report:
        inside = model(tokens(), labels=tokens(), return_dict=False)
    assert type(inside) is tuple
    torch.testing.assert_close(inside[0], eager[0], rtol=1e-6, atol=0)
    assert torch.equal(inside[1], eager[1])
    assert [row.served for row in report] == [1]
    assert made == [True]
