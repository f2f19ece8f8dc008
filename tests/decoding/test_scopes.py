"""Patches that begin and end while a cache lives on, and what they keep alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch

import hf_kernel_patch
from tests.support.decoding import (
    INCLUDE,
    Fused,
    alone,
    build,
    contents,
    decode,
    everywhere,
    generate,
    has_kernel,
    ids,
    replayed,
    same,
    started,
    step,
)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def in_parts(model: Any, patches: list[Any]) -> Any:
    """One sequence, decoded under one patch after the other; None is no patch."""
    found, (token, cache) = [], started(model)
    for patch in patches:
        if patch is None:
            logits, _ = decode(model, token, cache, 5)
        else:
            with patch(model):
                logits, _ = decode(model, token, cache, 5)
        found.append((logits, contents(cache)))
        token = ids(2, 1, seed=len(found))
    return found, cache


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_a_cache_goes_through_patches(name: str) -> None:
    expected = in_parts(build(name), [None] * 6)
    same(in_parts(build(name), [alone, None, everywhere, alone, everywhere, None]), expected)


def test_nested_patches() -> None:
    model = build()
    expected = decode(build(), steps=20)
    with everywhere():
        first, cache = decode(model, steps=5)
        with alone(model):
            token = first[-1][:, -1:].argmax(-1)
            second, cache = decode(model, token, cache, 5)
            with everywhere():
                token = second[-1][:, -1:].argmax(-1)
                third, cache = decode(model, token, cache, 5)
        token = third[-1][:, -1:].argmax(-1)
        last, cache = decode(model, token, cache, 5)
    same((first + second + third + last, cache), expected)


def test_standing_patches() -> None:
    model, expected = build(), generate(build())
    for _ in range(2):
        hf_kernel_patch.patch_transformers(INCLUDE)
        same(generate(model), expected)
        hf_kernel_patch.unpatch()
        same(generate(model), expected)


def test_other_kernels_in_force_later() -> None:
    """Those of the parts change, and so does what a replay runs."""
    expected = in_parts(build(), [None] * 3)

    def others(model: Any) -> Any:
        return hf_kernel_patch.patched("torch_fused_rmsnorm,torch_fused_rope")

    found = in_parts(build(), [everywhere, others, everywhere])
    same(found, expected)
    model = build()
    with alone(model), others(model):
        same(generate(model), generate(build()))


def test_a_copy_of_a_patched_model(fused: Fused) -> None:
    model, expected = build(), generate(build())
    with fused(model):
        generate(model)
        other = copy.deepcopy(model)
        other.lm_head.weight.mul_(-1)
        same(generate(model), expected)
        found = generate(other)
    hf_kernel_patch.unpatch(other)
    same(found, generate(other))


def test_a_pickle_of_what_was_decoded(fused: Fused) -> None:
    model = build()
    with fused(model):
        found, cache = decode(model)
        again, kept = pickle.loads(pickle.dumps((found, cache)))
    same((again, kept), decode(build()))


def test_the_state_dict_is_the_same(fused: Fused) -> None:
    model = build()
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    buffers = [name for name, _ in model.named_buffers()]
    with fused(model):
        generate(model)
        after = {name: value.data_ptr() for name, value in model.state_dict().items()}
        assert [name for name, _ in model.named_buffers()] == buffers
        held = {id(parameter) for parameter in model.parameters()}
        assert held == {id(parameter) for parameter in build_parameters(model)}
    assert after == before


def build_parameters(model: Any) -> Any:
    return [p for module in model.modules() for p in module._parameters.values() if p is not None]


def references(model: Any, cache: Any) -> dict[str, Any]:
    held = {
        "model": model,
        "weight": model.model.layers[0].mlp.up_proj.weight,
        "cache": cache,
        "layer": cache.layers[0],
    }
    return {name: weakref.ref(thing) for name, thing in held.items()}


def alive(found: dict[str, Any]) -> list[str]:
    gc.collect()
    return [name for name, reference in found.items() if reference() is not None]


def test_nothing_is_kept_after_the_patch(fused: Fused) -> None:
    model = build()
    with fused(model):
        _, cache = decode(model)
    found = references(model, cache)
    del model, cache
    assert not alive(found)


def test_nothing_is_kept_while_the_patch_stands(fused: Fused) -> None:
    model = build()
    with everywhere():
        if fused is alone:
            hf_kernel_patch.apply_default_kernels(model, INCLUDE)
        _, cache = decode(model)
        found = references(model, cache)
        del cache
        assert alive(found) == ["model", "weight"]
        del model
        assert not alive(found)
    hf_kernel_patch.unpatch()


def test_a_cache_outlives_its_model() -> None:
    model = build()
    with everywhere():
        _, cache = decode(model)
        expected = contents(cache)
        model = weakref.ref(model)
        gc.collect()
        assert model() is None
        same(decode(build(), ids(2, 1), cache), decode(build(), ids(2, 1), decode(build())[1]))
    same(expected, contents(decode(build())[1]))


def test_memory_does_not_grow_with_the_number_of_caches() -> None:
    """Tensors alive after many generations are as many as after few."""

    def count() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)

    model = build()
    with alone(model):
        for seed in range(3):
            generate(model, ids(2, 9, seed))
        before = count()
        for seed in range(6):
            generate(model, ids(2, 9, seed))
        assert count() <= before + 4


def test_all_of_it_was_replayed() -> None:
    """From the first tokens on that need no warming up, each token of a loop is one replay."""
    model = build()
    with alone(model):
        token, cache = started(model)
        before = replayed(hf_kernel_patch.status())
        for _ in range(5):
            token = step(model, token, cache).logits.argmax(-1)
        count = replayed(hf_kernel_patch.status()) - before
    assert count == (5 if has_kernel() else 0)
