"""What users do with a cache between two tokens."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
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
    generate,
    ids,
    started,
    step,
)
from tests.support.tiny import TRANSFORMERS_5

pytestmark = pytest.mark.versions

NAMES = ["llama", "gemma2"]


def rows(*places: int) -> torch.Tensor:
    return torch.tensor(places, device=DEVICE)


def repeated(cache: Any) -> None:
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(rows(0, 3))


def written(cache: Any) -> None:
    cache.layers[0].keys[:, :, 2:4].mul_(-1)
    cache.layers[1].values[0].zero_()


def replaced(cache: Any) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.flip(0).clone(), layer.values.flip(0).clone()


def exchanged(cache: Any) -> None:
    """Layers of another cache that is as long."""
    cache.layers[:] = copy.deepcopy(cache.layers)
    cache.layers[0].keys.add_(0.1)


def moved(cache: Any) -> None:
    """The same contents at other strides."""
    for layer in cache.layers:
        layer.keys = layer.keys.transpose(1, 2).contiguous().transpose(1, 2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "crop": lambda cache: cache.crop(-3),
    "reorder_cache": lambda cache: cache.reorder_cache(rows(1, 0)),
    "one row twice": lambda cache: cache.reorder_cache(rows(1, 1)),
    "batch_select_indices": lambda cache: cache.batch_select_indices(rows(1, 0)),
    "batch_repeat_interleave": repeated,
    "written": written,
    "replaced": replaced,
    "exchanged": exchanged,
    "moved": moved,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change(change: Callable[[Any], Any]) -> None:
    def run(model: Any) -> Any:
        token, cache = started(model)
        change(cache)
        between = contents(cache)
        first, _ = decode(model, token, cache)
        change(cache)
        return between, first, decode(model, token, cache)

    check(run, alone)


@pytest.mark.parametrize("name", NAMES)
def test_changes_after_every_token(name: str) -> None:
    def run(model: Any) -> Any:
        def each(place: int, cache: Any) -> None:
            cache.reorder_cache(rows(1, 0))
            if place % 3 == 2:
                written(cache)

        return decode(model, each=each, steps=9)

    check(run, alone, name, replays=None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deep", "disk"]
)
def test_branches_of_copies(copied: Callable[[Any], Any], name: str) -> None:
    def run(model: Any) -> Any:
        token, cache = started(model)
        other = copied(cache)
        one = decode(model, token, cache)
        two = decode(model, ids(2, 1, seed=4), other)
        assert not any(
            one[1].layers[0].keys.data_ptr() == layer.keys.data_ptr() for layer in two[1].layers
        )
        return one, two, decode(model, ids(2, 1), cache), decode(model, ids(2, 1), other)

    check(run, alone, name)


def branch(cache: Any) -> Any:
    """A cache with layers of its own, which share keys and values with the first one."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@pytest.mark.parametrize("name", NAMES)
def test_branches_that_share_what_was_there(name: str) -> None:
    """The original makes new tensors for each token, so neither branch sees the other's."""

    def run(model: Any) -> Any:
        token, cache = started(model)
        other, found = branch(cache), []
        for place in range(5):
            found.append(step(model, token, cache).logits)
            found.append(step(model, ids(2, 1, seed=place), other).logits)
        return found, contents(cache), contents(other)

    check(run, alone, name)


def test_a_branch_made_by_crop() -> None:
    """What was cropped away is still in what somebody keeps."""

    def run(model: Any) -> Any:
        token, cache = started(model)
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        cache.crop(-4)
        first = decode(model, ids(2, 1, seed=6), cache)
        for layer, (keys, values) in zip(cache.layers, kept):
            layer.keys, layer.values = keys, values
        return first[0], [keys.clone() for keys, _ in kept], decode(model, token, cache)

    check(run, alone)


def test_kept_keys_and_values_do_not_change(fused: Fused) -> None:
    def run(model: Any) -> Any:
        kept: list[tuple[Any, Any]] = []

        def each(place: int, cache: Any) -> None:
            for layer in cache.layers:
                kept.append((layer.keys, layer.keys.clone()))
                kept.append((layer.values, layer.values.clone()))

        _, cache = decode(model, each=each, steps=10)
        cache.crop(-5)
        decode(model, ids(2, 1), cache, each=each)
        assert all(torch.equal(now, then) for now, then in kept)
        return [then for _, then in kept]

    check(run, fused)


def test_caches_in_turns(fused: Fused) -> None:
    def run(model: Any) -> Any:
        caches = [started(model, token=ids(2, length))[1] for length in (4, 9, 9)]
        for place in range(6):
            for number, cache in enumerate(caches):
                step(model, ids(2, 1, seed=10 * number + place), cache)
        return [decode(model, ids(2, 1), cache) for cache in caches]

    check(run, fused)


def test_other_batch_sizes_in_turns() -> None:
    def run(model: Any) -> Any:
        caches = [(size, started(model, token=ids(size, 6))[1]) for size in (1, 3, 2, 5, 4, 6)]
        found = [decode(model, ids(size, 1), cache) for size, cache in caches]
        return found, [decode(model, ids(size, 1), cache, 3) for size, cache in caches]

    check(run, alone)


def test_rows_that_leave_and_come() -> None:
    def run(model: Any) -> Any:
        _, cache = started(model)
        cache.batch_select_indices(rows(1))
        first = decode(model, ids(1, 1), cache)[0]
        cache.batch_repeat_interleave(3)
        return first, decode(model, ids(3, 1), cache)

    check(run, alone)


def test_reset() -> None:
    def run(model: Any) -> Any:
        first, cache = decode(model)
        cache.reset()
        if not TRANSFORMERS_5:  # it fills with zeros what a new prompt would be appended to
            cache = empty_cache(model)
        return first, decode(model, ids(2, 4), cache)

    check(run, alone)


@pytest.mark.parametrize("name", NAMES)
def test_generation_goes_on_with_the_cache(name: str) -> None:
    def run(model: Any) -> Any:
        first = generate(model)
        prompt = torch.cat([first.sequences, ids(2, 3, seed=8)], -1)
        second = generate(model, {"input_ids": prompt, CACHE: cache_of(first)})
        longer = torch.cat([second.sequences, ids(2, 1, seed=9)], -1)
        return second, generate(model, {"input_ids": longer, CACHE: cache_of(second)})

    check(run, alone, name)


def test_a_prompt_cache_that_is_copied_for_each_question(fused: Fused) -> None:
    def run(model: Any) -> Any:
        prompt = ids(1, 7)
        start = cache_of(model(prompt, use_cache=True, **{CACHE: empty_cache(model)}))
        found = []
        for seed in range(3):
            question = torch.cat([prompt, ids(1, 3, seed=seed)], -1)
            found.append(generate(model, {"input_ids": question, CACHE: copy.deepcopy(start)}))
        return found, contents(start)

    check(run, fused)
