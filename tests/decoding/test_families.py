"""Greedy decoding of families whose attention, masks and caches differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_kernel_patch
from tests.support.decoding import (
    alone,
    build,
    check,
    decode,
    everywhere,
    generate,
    has_kernel,
    ids,
    padded,
    replayed,
    same,
)

pytestmark = pytest.mark.versions

#: Families whose tokens are replayed, and what their test has of its own.
REPLAYED = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "olmoe",
    "deepseek_v3",
    "gpt2",
    "gpt_neox",
    "cohere2",
    "granite",
]
#: Families that have an attention of other kinds in some layers: nothing is replayed.
NOT_REPLAYED = ["qwen3_next"]
#: Their sinks or soft caps need the eager attention.
EAGER = {"gpt_oss", "gemma2"}
#: Whether experts or an old forward can be replayed is for the kernel to say.
EITHER = {"qwen3_moe", "olmoe", "deepseek_v3", "gpt2", "gpt_neox", "gpt_oss", "cohere2", "phi3"}
CASES = [
    (name, attention)
    for name in REPLAYED
    for attention in ("sdpa", "eager")
    if name in CONFIG_MAPPING and (attention == "eager" or name not in EAGER)
]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_greedy(name: str, attention: str) -> None:
    replays = None if name in EITHER else True
    check(generate, alone, name, replays, attn_implementation=attention)


def test_greedy_with_all_models_patched() -> None:
    names = [name for name in REPLAYED if name in CONFIG_MAPPING]
    models = {name: build(name) for name in names}
    with torch.no_grad():
        expected = {name: generate(model) for name, model in models.items()}
        with everywhere():
            found = {name: generate(build(name)) for name in names}
            count = replayed(hf_kernel_patch.status())
    same(found, expected)
    assert (count > 0) == has_kernel()


@pytest.mark.parametrize("name", [name for name in NOT_REPLAYED if name in CONFIG_MAPPING])
def test_mixed_layers_run_as_before(name: str) -> None:
    check(generate, alone, name, replays=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_a_window_that_the_prompt_fills_or_not(name: str, attention: str) -> None:
    def run(model: Any) -> Any:
        plain = [generate(model, ids(2, length)) for length in (3, 7, 8, 12)]  # the window is 8
        return plain, [generate(model, padded(2, length)) for length in (5, 12)]

    check(run, alone, name, attn_implementation=attention)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "gpt2"])
def test_a_batch_filled_from_the_left(name: str) -> None:
    check(lambda model: generate(model, padded()), alone, name, replays=None)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions_in_a_loop(name: str, dtype: torch.dtype) -> None:
    """The same tokens go in, so that a rounding cannot lead to other ones."""

    def run(model: Any) -> Any:
        model.to(dtype)
        found, cache = decode(model, steps=1)
        for place in range(7):
            logits, cache = decode(model, ids(2, 1, seed=place), cache, steps=1)
            found += logits
        return found, cache

    check(run, alone, name)


def test_a_cache_that_outgrows_several_buckets() -> None:
    check(
        lambda model: generate(model, ids(1, 5), max_new_tokens=280),
        alone,
        max_position_embeddings=512,
    )
