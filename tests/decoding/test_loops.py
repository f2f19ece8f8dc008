"""Loops of a user's own, without ``generate``."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tests.support.decoding import (
    CACHE,
    DEVICE,
    Fused,
    alone,
    cache_of,
    check,
    contents,
    decode,
    empty_cache,
    following,
    ids,
    padded,
    started,
    step,
)
from tests.support.tiny import modelling

pytestmark = pytest.mark.versions

NAMES = ["llama", "mistral", "qwen3"]
TAKEN = inspect.signature(modelling("llama").LlamaForCausalLM.forward).parameters


@pytest.mark.parametrize("name", NAMES)
def test_the_shortest_loop(name: str) -> None:
    check(decode, alone, name)


def test_the_shortest_loop_with_all_models(fused: Fused) -> None:
    check(decode, fused)


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_the_user_made(name: str, configured: bool) -> None:
    def run(model: Any) -> Any:
        made = empty_cache(model, configured)
        found, cache = decode(model, cache=made)
        assert cache is made
        return found, cache

    check(run, alone, name, replays=None if name == "mistral" else True)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_for_each_token(name: str) -> None:
    def run(model: Any) -> Any:
        given, cache, found = padded(), None, []
        token, mask = given["input_ids"], given["attention_mask"]
        for _ in range(8):
            output = step(model, token, cache, attention_mask=mask)
            cache, token = cache_of(output), following(output)
            mask = torch.cat([mask, mask[:, -1:]], -1)
            found.append(output)
        return found

    check(run, alone, name)


def test_a_mask_that_changes_between_tokens() -> None:
    """The same shape, another content: what was masked once is seen later."""

    def run(model: Any) -> Any:
        token, cache = started(model)
        found = []
        for place in range(6):
            mask = torch.ones(2, 9 + 6 + place, dtype=torch.long, device=DEVICE)
            mask[place % 2, place : place + 4] = 0
            output = step(model, token, cache, attention_mask=mask)
            found.append(output.logits)
            token = following(output)
        return found, cache

    check(run, alone, replays=None)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_of_four_dimensions(kind: torch.dtype, attention: str) -> None:
    if (kind, attention) == (torch.bool, "eager"):
        pytest.skip("the eager attention adds its mask")

    def run(model: Any) -> Any:
        token, cache = started(model)
        found = []
        for place in range(5):
            seen = torch.rand(2, 1, 1, cache.get_seq_length() + 1, device=DEVICE) > 0.4
            seen[..., -1] = True
            mask = seen if kind is torch.bool else (~seen).float() * torch.finfo(kind).min
            output = step(model, token, cache, attention_mask=mask)
            token, cache = following(output), cache_of(output)
            found.append((place, output.logits))
        return found, cache

    def seeded(model: Any) -> Any:
        torch.manual_seed(5)
        return run(model)

    check(seeded, alone, replays=None, attn_implementation=attention)


def test_positions_of_the_users() -> None:
    """Far from where the cache ends, different in each row, and backwards."""

    def run(model: Any) -> Any:
        token, cache = started(model)
        found = []
        for place in range(6):
            positions = torch.tensor([[30 - place], [20 + 2 * place]], device=DEVICE)
            output = step(model, token, cache, position_ids=positions)
            token = following(output)
            found.append(output.logits)
        return found, cache

    check(run, alone, replays=None)


def test_one_row_of_positions_for_all() -> None:
    def run(model: Any) -> Any:
        _, cache = started(model)
        positions = torch.tensor([[25]], device=DEVICE)
        return [step(model, ids(2, 1), cache, position_ids=positions).logits for _ in range(5)]

    check(run, alone, replays=None)


@pytest.mark.skipif("cache_position" not in TAKEN, reason="no cache_position")
def test_cache_positions() -> None:
    def run(model: Any) -> Any:
        token, cache = started(model)
        found = []
        for place in range(5):
            here = torch.tensor([15 + place], device=DEVICE)
            output = step(model, token, cache, cache_position=here)
            token = following(output)
            found.append(output.logits)
        return found, cache

    check(run, alone, replays=None)


def test_no_cache_is_asked_for() -> None:
    def run(model: Any) -> Any:
        token, cache = started(model)
        first = [model(ids(2, 1), use_cache=False) for _ in range(4)]
        second = step(model, token, cache, use_cache=False)
        return first, second, decode(model, token, cache)

    check(run, alone)


def test_one_token_without_a_cache() -> None:
    check(lambda model: [model(ids(2, 1)) for _ in range(6)], alone, replays=None)


def test_a_prompt_of_one_token() -> None:
    check(lambda model: decode(model, ids(2, 1)), alone)


def test_several_tokens_in_the_middle(fused: Fused) -> None:
    def run(model: Any) -> Any:
        first, cache = decode(model)
        second, cache = decode(model, ids(2, 5, seed=2), cache)
        return first, second, decode(model, ids(2, 2, seed=3), cache)

    check(run, fused)


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_instead_of_tokens(name: str) -> None:
    def run(model: Any) -> Any:
        token, cache = started(model)
        found = []
        for place in range(6):
            embedded = model.get_input_embeddings()(token)
            if place % 2:
                embedded = embedded * 1.5
            output = model(inputs_embeds=embedded, **{CACHE: cache})
            token = following(output)
            found.append(output.logits)
        return found, cache

    check(run, alone, name, replays=None)


def test_labels() -> None:
    def run(model: Any) -> Any:
        _, cache = started(model)
        token = ids(2, 2)
        several = step(model, token, cache, labels=token)
        alone_ = step(model, ids(2, 1), cache, labels=ids(2, 1))
        return several.loss, several.logits, alone_.logits, decode(model, ids(2, 1), cache)

    check(run, alone)


def test_logits_that_are_kept_do_not_change() -> None:
    def run(model: Any) -> Any:
        kept: list[Any] = []
        copies: list[Any] = []
        token, cache = started(model, 1)
        for _ in range(9):
            output = step(model, token, cache)
            kept.append(output.logits)
            copies.append(output.logits.clone())
            token = following(output)
        assert all(map(torch.equal, kept, copies))
        kept[-1].zero_()  # they are the user's
        return copies, decode(model, token, cache)

    check(run, alone)


def test_the_cache_is_right_after_every_token(fused: Fused) -> None:
    def run(model: Any) -> Any:
        looks: list[Any] = []
        decode(model, each=lambda place, cache: looks.append(contents(cache)), steps=12)
        return looks

    check(run, fused)


def test_tokens_that_the_user_writes_over() -> None:
    """One tensor for all tokens, as those have who save memory."""

    def run(model: Any) -> Any:
        token, cache = started(model)
        buffer, found = token.clone(), []
        for _ in range(8):
            output = step(model, buffer, cache)
            buffer.copy_(following(output))
            found.append((output.logits, buffer.clone()))
        return found, cache

    check(run, alone)


def test_all_arguments_by_name_and_by_place() -> None:
    def run(model: Any) -> Any:
        token, cache = started(model)
        mask = torch.ones(2, 16, dtype=torch.long, device=DEVICE)
        one = model(token, mask, None, cache)
        mask = torch.ones(2, 17, dtype=torch.long, device=DEVICE)
        other = model(input_ids=token, attention_mask=mask, **{CACHE: cache}, use_cache=True)
        return one, other

    check(run, alone, replays=None)


def test_errors_of_the_original() -> None:
    """They come as before, and decoding goes on."""

    def run(model: Any) -> Any:
        token, cache = started(model)
        found = []
        for wrong in ({}, {"input_ids": token, "inputs_embeds": torch.zeros(2, 1, 64)}):
            with pytest.raises(ValueError) as raised:
                model(**wrong, **{CACHE: cache})
            found.append(str(raised.value))
        with pytest.raises((IndexError, RuntimeError)):
            step(model, token + 10_000, cache)
        return found, decode(model, token, cache)

    if DEVICE == "cuda":
        pytest.skip("an index out of range ends the process on a CUDA device")
    check(run, alone)
