"""Head and loss in one op: every option and every model as transformers has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hf_kernel_patch
from tests.recognition.rules.head_loss.steps import LOSS, agree, labels, run
from tests.support.ops.inputs import draw
from tests.support.tiny import error, having, modelling, tiny_model, tokens

KEPT = torch.tensor([2, 5, 9])


#: name -> the arguments besides the ids.
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "labels": lambda: {"labels": labels()},
    "all labels ignored": lambda: {"labels": torch.full_like(tokens(), -100)},
    "shift_labels": lambda: {"labels": tokens(), "shift_labels": labels()},
    "num_items_in_batch, an int": lambda: {"labels": labels(), "num_items_in_batch": 7},
    "num_items_in_batch, a tensor": lambda: {
        "labels": labels(),
        "num_items_in_batch": torch.tensor(7),
    },
    "num_items_in_batch, as DataParallel scatters it": lambda: {
        "labels": labels(),
        "num_items_in_batch": torch.tensor([[7]]),
    },
    "ignore_index": lambda: {"labels": tokens(), "ignore_index": int(tokens()[0, 3])},
    "the last positions": lambda: {"labels": labels()[:, -4:], "logits_to_keep": 4},
    "some positions": lambda: {"labels": labels()[:, KEPT], "logits_to_keep": KEPT},
    "a mask": lambda: {
        "labels": labels(),
        "attention_mask": torch.ones_like(tokens()).tril(14),
        "position_ids": torch.arange(17).expand(2, -1),
    },
    "hidden states and a cache": lambda: {
        "labels": labels(),
        "output_hidden_states": True,
        "use_cache": True,
    },
    "embeddings": lambda: {"labels": labels(), "inputs_embeds": draw((2, 17, 64), grad=False)},
    "an argument that the loss ignores": lambda: {"labels": labels(), "label_smoothing": 0.1},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "qwen3_moe"])
def test_every_option_gives_what_the_original_gives(name: str, option: str) -> None:
    model = tiny_model(name).train()
    eager = run(model, **OPTIONS[option]())
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LOSS, models=name, strict=True) as report:
        inside = run(model, **OPTIONS[option]())
    agree(inside, eager)
    assert sum(row.served for row in report) == 1
    assert not any(row.fallbacks for row in report)


@pytest.mark.parametrize("name", having("linear_cross_entropy"))
def test_arguments_by_position_and_a_head_with_a_bias(name: str) -> None:
    model = tiny_model(name, tie_word_embeddings=False).train()
    model.lm_head.bias = nn.Parameter(torch.randn(model.lm_head.out_features))
    ids = tokens()
    given = (ids, torch.ones_like(ids), None, None, None, labels())
    eager = run(model, *given)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LOSS, models=name, strict=True) as report:
        agree(run(model, *given), eager)
    assert sum(row.served for row in report) == 1  # a table may name the model around this one
    assert "gradient of lm_head.bias" in eager


ROUTED = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}


@pytest.mark.parametrize("name", sorted(ROUTED & set(having("linear_cross_entropy"))))
@pytest.mark.parametrize("asked", [None, False, True])
def test_the_router_s_loss_is_added(name: str, asked: bool | None) -> None:
    model = tiny_model(name, output_router_logits=asked is None, router_aux_loss_coef=0.5).train()
    options = {"labels": labels(), "attention_mask": torch.ones_like(tokens()).tril(14)}
    if asked is not None:
        options["output_router_logits"] = asked
    eager = run(model, **options)
    with hf_kernel_patch.patched(LOSS, models=name, strict=True):
        agree(run(model, **options), eager)
    assert ("aux_loss" in eager["keys"]) == (asked is not False)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: model.lm_head.requires_grad_(False), id="frozen-head"),
        pytest.param(lambda model: model.model.requires_grad_(False), id="head-alone"),
        pytest.param(lambda model: model.resize_token_embeddings(150), id="more-tokens"),
        pytest.param(lambda model: model.resize_token_embeddings(100), id="fewer-tokens"),
        pytest.param(lambda model: model.gradient_checkpointing_enable(), id="checkpointing"),
    ],
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("tied", [False, True])
def test_a_changed_model_is_served(change: Callable[[Any], Any], tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied).train()
    change(model)
    options = {"labels": tokens() % 100, "use_cache": False}
    ids = tokens() % 100
    eager = run(model, ids, **options)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True) as report:
        agree(run(model, ids, **options), eager)
    assert [row.served for row in report] == [1]


def test_a_wrong_length_of_labels_is_the_original_s_error() -> None:
    model = tiny_model("llama").train()
    with pytest.raises(ValueError) as eager:
        model(tokens(), labels=tokens()[:, :5])
    with (
        hf_kernel_patch.patched(LOSS, models="llama", strict=True),
        pytest.raises(ValueError) as ours,
    ):
        model(tokens(), labels=tokens()[:, :5])
    assert str(ours.value) == str(eager.value)


def test_an_argument_given_twice_is_the_original_s_error() -> None:
    model = tiny_model("llama").train()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True), pytest.raises(TypeError):
        model(tokens(), input_ids=tokens(), labels=tokens())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_logits_have_its_dtype(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype).train()
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(tokens(), labels=labels())
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True) as report:
        with torch.autocast("cpu", torch.bfloat16):
            inside = model(tokens(), labels=labels())
        assert torch.equal(inside.logits, eager.logits)  # read where autocast is over
    assert [row.served for row in report] == [1]
    assert inside.loss.dtype is eager.loss.dtype
    torch.testing.assert_close(inside.loss, eager.loss, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(one.loss, model.lm_head.weight)[0] for one in (inside, eager)]
    assert gradients[0].dtype is gradients[1].dtype
    assert error(*gradients) < 5e-3


def test_a_gradient_scaler_scales() -> None:
    model = tiny_model("llama", torch.float16).train()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    found = []
    for include in (None, LOSS):
        model.zero_grad()
        with hf_kernel_patch.patched(include, models="llama"):
            scaler.scale(model(tokens(), labels=labels()).loss).backward()
        found.append(model.lm_head.weight.grad.clone())
    assert error(*found[::-1]) < 2e-3


def test_without_gradients_none_are_made() -> None:
    model = tiny_model("llama").train()
    with torch.no_grad():
        eager = model(tokens(), labels=labels())
        with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
            inside = model(tokens(), labels=labels())
    torch.testing.assert_close(inside.loss, eager.loss)
    assert not inside.loss.requires_grad
    assert torch.equal(inside.logits, eager.logits)


def test_steps_accumulated_give_the_loss_and_gradients_of_one() -> None:
    """By num_items_in_batch, as the Trainer hands it out."""
    model, ids = tiny_model("llama").train(), tokens(batch=4)
    whole = model(ids, labels=ids)
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        parts = [
            model(part, labels=part, num_items_in_batch=torch.tensor(4 * 16)).loss
            for part in ids.split(1)
        ]
        sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole.loss)
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, expected[name]) < 3e-6


def test_code_of_the_loss_that_is_not_known_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.loss import loss_utils

    def fixed_cross_entropy(source: Any, target: Any, *_: Any, **options: Any) -> Any:
        return nn.functional.cross_entropy(source, target) * 2

    model = tiny_model("llama").train()
    modelling("llama")
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True) as report:
        monkeypatch.setattr(loss_utils, "fixed_cross_entropy", fixed_cross_entropy)
        inside = model(tokens(), labels=tokens())
    assert torch.equal(inside.loss, model(tokens(), labels=tokens()).loss)
    assert [set(row.fallbacks) for row in report] == [
        {"fixed_cross_entropy of transformers was replaced"}
    ]
