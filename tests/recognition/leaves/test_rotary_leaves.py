"""What takes the place of rotary functions computes what they do, from all of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.rope import CudaFusedRoPE
from hf_kernel_patch.recognition import Leaf, known
from hf_kernel_patch.recognition import site as sites
from hf_kernel_patch.recognition.outcome import SERVED
from hf_kernel_patch.recognition.source import innermost
from tests.recognition.leaves.rotary import (
    BF16,
    EVERY,
    F16,
    F32,
    HALVES,
    HEADS_FIRST,
    PACKED,
    PLACES,
    TOKENS_FIRST,
    Place,
    inputs,
    place_of,
    results,
    serving,
)
from tests.support.tiny import error

pytestmark = pytest.mark.versions


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "counting", True)


def test_every_leaf_has_a_place() -> None:
    leaves = {one.name for one in known().values() if isinstance(one, Leaf) and one.op == "rope"}
    assert {place.leaf for place in PLACES} == leaves


@EVERY
def test_it_is_this_leaf_and_no_other(place: Place) -> None:
    original, module = place.original, place.module
    leaves = [one for one in known().values() if isinstance(one, Leaf) and one.op == "rope"]
    assert [one.name for one in leaves if one.why_not(original, module) is None] == [place.leaf]


@EVERY
@pytest.mark.parametrize("dtype", [F32, *HALVES], ids=str)
def test_it_is_served_as_the_original_does_it(place: Place, dtype: torch.dtype) -> None:
    function, calls = serving(place)
    given = inputs(place, (dtype,) * 4)
    eager, eager_grads = results(place.original, given)
    ours, grads = results(function, given)
    assert calls == {SERVED: 1}
    for one, other in zip(ours, eager, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    with pytest.MonkeyPatch.context() as patch:  # what is computed in float32 is so in float64
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        _, truth = results(place.original, given, torch.float64)
    for one, other, wide in zip(grads, eager_grads, truth, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert error(one, wide) <= 1.2 * error(other, wide) + 1e-7


@EVERY
def test_it_takes_arguments_as_the_original_does(place: Place) -> None:
    function, calls = serving(place)
    names = list(inspect.signature(innermost(place.original)).parameters)
    given = dict(zip(names, inputs(place)))
    by_name, expected = function(**given), place.original(**given)
    if not isinstance(expected, tuple):
        by_name, expected = (by_name,), (expected,)
    assert all(map(torch.equal, by_name, expected))
    assert calls == {SERVED: 1}


@EVERY
@pytest.mark.parametrize("size", ["no token", "one token"])
def test_decoding_and_nothing_at_all(place: Place, size: str) -> None:
    tokens = {"no token": 0, "one token": 1}[size]
    if place.leaf == "rope.prefix":
        pytest.skip("images have the tokens that they have")
    function, _ = serving(place)
    axis = {HEADS_FIRST: 2, TOKENS_FIRST: 1, PACKED: 0}[place.layout]
    given = inputs(place)
    for i, x in enumerate(given):
        if isinstance(x, torch.Tensor):
            is_angle = x.shape == place.angles and i
            given[i] = x.narrow(x.dim() - 2 if is_angle else axis, 0, tokens)
    try:
        eager, _ = results(place.original, given)
    except RuntimeError:  # of a view of no elements
        pytest.skip("the original takes no such thing")
    ours, _ = results(function, given)
    assert all(map(torch.equal, ours, eager))


MIXED = ("llama", "phi3", "olmo2", "gpt_oss", "cohere", "glm", "ernie4_5", "deepseek_v3")


@pytest.mark.parametrize("family", [*MIXED, "pe_audio", "qwen2_vl", "modernbert", "gemma3n"])
def test_any_mix_of_dtypes_gives_the_dtypes_and_bits_of_the_original(family: str) -> None:
    place = place_of(family)
    function, calls = serving(place)
    for dtypes in product((F32, F16, BF16), repeat=4):
        given = inputs(place, dtypes)
        found, expected = function(*given), place.original(*given)
        if not isinstance(expected, tuple):
            found, expected = (found,), (expected,)
        assert [x.dtype for x in found] == [x.dtype for x in expected], dtypes
        assert all(map(torch.equal, found, expected)), dtypes
    assert sum(calls.values()) == 81
    assert calls[SERVED] >= 27


# -- q alone


@pytest.mark.parametrize("family", ["qwen4_exp", "mistral_large4"])
def test_q_alone_where_the_original_takes_it(family: str) -> None:
    place = place_of(family)
    function, calls = serving(place)
    given = inputs(place, one=True)
    (ours, grads), (eager, eager_grads) = (
        results(call, given) for call in (function, place.original)
    )
    assert calls == {SERVED: 1}
    assert all(map(torch.equal, ours, eager))
    assert all(map(torch.allclose, grads, eager_grads))
    found, expected = function(*given), place.original(*given)
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        assert found[1] is expected[1] is None


# -- in Triton, and compiled

COMPILED = ("llama", "qwen2_vl", "glm", "deepseek_v3", "gemma3n", "dinov3_vit", "sam3", "qwen4_exp")


@pytest.fixture(name="triton_kernel")
def _triton_kernel() -> Iterator[Any]:
    from tests.support.ops.interpreted import here

    yield here(CudaFusedRoPE)


@pytest.mark.parametrize("family", [*COMPILED, "gpt_oss", "deepseek_v4", "gptj", "pixtral"])
def test_triton_serves_it(family: str, triton_kernel: Any) -> None:
    place = place_of(family)
    function, calls = serving(place, triton_kernel)
    given = inputs(place)
    eager, eager_grads = results(place.original, given)
    ours, grads = results(function, given)
    assert calls == {SERVED: 1}
    for one, other in zip([*ours, *grads], [*eager, *eager_grads], strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert error(one, other) < 1e-6


@pytest.mark.parametrize("family", COMPILED)
def test_it_compiles_as_one_graph(family: str, triton_kernel: Any) -> None:
    place = place_of(family)
    function, calls = serving(place, triton_kernel)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    given = inputs(place)
    (ours, grads), (eager, eager_grads) = (results(call, given) for call in (compiled, function))
    assert all(map(torch.equal, [*ours, *grads], [*eager, *eager_grads]))
    assert calls[SERVED] >= 2
