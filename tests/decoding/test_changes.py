"""Weights, configs and code that change between two tokens or two calls."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.decoding import Fused, alone, check, decode, everywhere, ids
from tests.support.tiny import modelling


def loaded(model: Any) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def in_place(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def by_data(model: Any) -> None:
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.data = weight.data.roll(1).clone()


def new_parameter(model: Any) -> None:
    projection = model.model.layers[1].self_attn.k_proj
    projection.weight = torch.nn.Parameter(projection.weight.flip(0).clone())


def new_norm(model: Any) -> None:
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 2)


def new_module(model: Any) -> None:
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)


def new_head(model: Any) -> None:
    head = torch.nn.Linear(64, model.config.vocab_size, bias=False, device=model.device)
    model.set_output_embeddings(head.requires_grad_(True))
    model.lm_head.weight.copy_(model.get_input_embeddings().weight.flip(0))


def new_embedding(model: Any) -> None:
    model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight.flip(0))


def new_angles(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def angles_in_place(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def layers_exchanged(model: Any) -> None:
    first, second = model.model.layers
    first.mlp, second.mlp = second.mlp, first.mlp


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


def scaled(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.5


def epsilon(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.5


def activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def trained(model: Any) -> None:
    model.train()
    with torch.enable_grad():
        model(ids(), labels=ids()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.zero_grad()
    model.eval()


def trained_in_no_place(model: Any) -> None:
    """Training mode alone, and back."""
    model.train().eval()


def forward_on_an_instance(model: Any) -> None:
    layer = model.model.layers[0].mlp
    layer.forward = types.MethodType(
        lambda self, x: self.down_proj(x[..., :1] + self.up_proj(x)), layer
    )


def forward_of_the_model(model: Any) -> None:
    original = model.model.norm.forward
    model.model.norm.forward = lambda hidden: original(hidden) * 2


def frozen(model: Any) -> None:
    model.requires_grad_(False)


def without_a_layer(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.weight.zero_()


CHANGES: list[Callable[[Any], None]] = [
    loaded,
    in_place,
    by_data,
    new_parameter,
    new_norm,
    new_module,
    new_head,
    new_embedding,
    new_angles,
    angles_in_place,
    layers_exchanged,
    eager,
    scaled,
    epsilon,
    activation,
    trained,
    trained_in_no_place,
    forward_on_an_instance,
    forward_of_the_model,
    frozen,
    without_a_layer,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_tokens(change: Callable[[Any], None]) -> None:
    def run(model: Any) -> Any:
        first, cache = decode(model)
        change(model)
        second, cache = decode(model, ids(2, 1), cache)
        return first, second, decode(model, steps=6)

    check(run, alone)


def test_many_changes_with_all_models_patched(fused: Fused) -> None:
    def run(model: Any) -> Any:
        found, cache = decode(model)
        for change in (loaded, new_parameter, new_head, eager, trained, forward_on_an_instance):
            change(model)
            logits, cache = decode(model, ids(2, 1), cache, 5)
            found += logits
        return found, cache

    check(run, fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_and_back(dtype: torch.dtype) -> None:
    def run(model: Any) -> Any:
        first, _ = decode(model)
        model.to(dtype)
        found, cache = decode(model, steps=1)
        for place in range(5):
            logits, cache = decode(model, ids(2, 1, seed=place), cache, 1)
            found += logits
        return first, found, cache, decode(model.float())

    check(run, alone)


def test_more_tokens_in_the_vocabulary() -> None:
    def run(model: Any) -> Any:
        first, cache = decode(model)
        torch.manual_seed(1)
        model.resize_token_embeddings(140)
        return first, decode(model, ids(2, 1), cache)

    check(run, alone)


def test_a_weight_that_two_modules_share(fused: Fused) -> None:
    def run(model: Any) -> Any:
        first = decode(model)
        model.get_input_embeddings().weight.mul_(1.2)
        return first, decode(model)

    check(run, fused, tie_word_embeddings=True)


@pytest.mark.parametrize("place", ["LlamaMLP", "LlamaAttention", "LlamaModel", "LlamaForCausalLM"])
def test_a_forward_of_a_class_that_is_replaced(place: str) -> None:
    """Theirs runs while it is there."""
    kind = getattr(modelling("llama"), place)

    def run(model: Any) -> Any:
        calls: list[int] = []
        first, cache = decode(model)
        before = kind.forward

        def forward(self: Any, *given: Any, **options: Any) -> Any:
            calls.append(1)
            return before(self, *given, **options)

        kind.forward = forward
        try:
            second, cache = decode(model, ids(2, 1), cache, 4)
        finally:
            kind.forward = before
        return first, second, len(calls) > 0, decode(model, ids(2, 1), cache)

    check(run, everywhere, replays=None)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("apply_rotary_pos_emb", "sdpa"),
        ("rotate_half", "sdpa"),
        ("eager_attention_forward", "eager"),
        ("repeat_kv", "eager"),
    ],
)
def test_a_global_of_the_module_that_is_replaced(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = modelling("llama")

    def run(model: Any) -> Any:
        first, cache = decode(model)
        original = getattr(module, name)

        def replaced(*given: Any, **options: Any) -> Any:
            found = original(*given, **options)
            if isinstance(found, tuple):
                return (found[0] * 0.9, *found[1:])
            return found * 0.9

        with monkeypatch.context() as patch:
            patch.setattr(module, name, replaced)
            second, cache = decode(model, ids(2, 1), cache)
        return first, second, decode(model, ids(2, 1), cache)

    check(run, alone, attn_implementation=attention)


def test_an_attention_interface_that_is_replaced() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def run(model: Any) -> Any:
        first, cache = decode(model)
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def mine(*given: Any, **options: Any) -> Any:
            output, weights = original(*given, **options)
            return output * 0.5, weights

        ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
        try:
            second, cache = decode(model, ids(2, 1), cache)
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = original
        return first, second, decode(model, ids(2, 1), cache)

    check(run, alone, attn_implementation="sdpa")
