"""decode_attention in PyTorch, its reference, and the cache that kernels find by an address."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.decode_attention import (
    CudaFusedDecodeAttention,
    TorchFusedDecodeAttention,
    reference,
)
from hf_kernel_patch.ops.decode_attention.memory import LayerCache
from tests.support.ops.cases_decode_attention import CASES, Call, Case
from tests.support.ops.checks import F16, F32, F64, check_backend, check_reference
from tests.support.tiny import error

KERNEL = TorchFusedDecodeAttention


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_what_hugging_face_computes(case: Case) -> None:
    check_reference(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_further_from_the_truth_than_hugging_face(case: Case) -> None:
    check_backend(KERNEL, case)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nothing_allowed_gives_zeros(sinks: bool, softcap: float | None) -> None:
    arguments = Call(150, mask="nothing", sinks=sinks, softcap=softcap).arguments("cpu")
    found = KERNEL.load()(*arguments)
    assert not found[0].any() and found[1].all()
    wide = reference.decode_attention(arguments[0].double(), *arguments[1:], dtype=F64)
    assert error(found, wide) < 1e-6


def test_the_token_is_written_to_its_slot_alone() -> None:
    arguments = Call(5, start=100).arguments("cpu")
    _, key, value, layer = arguments[:4]
    before = layer.keys.clone(), layer.values.clone()
    KERNEL.load()(*arguments)
    for token, old, new in zip((key, value), before, (layer.keys, layer.values)):
        assert torch.equal(new[:, :, 5], token[:, :, 0])
        old[:, :, 5] = new[:, :, 5]
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


def test_the_address_follows_the_cache() -> None:
    layer = Call(0).layer("cpu")
    place = layer.address.data_ptr()
    assert layer.address.tolist() == [layer.keys.data_ptr(), layer.values.data_ptr(), 200, 0]
    other = Call(0, capacity=300).layer("cpu")
    layer.point_to(other.keys, other.values, start=7)
    assert layer.address.tolist() == [other.keys.data_ptr(), other.values.data_ptr(), 300, 7]
    assert layer.address.data_ptr() == place
    assert layer.numbers() == layer.address.tolist()


def test_a_row_of_a_table_may_be_the_address() -> None:
    table = torch.zeros(3, 4, dtype=torch.int64)
    other = Call(0).layer("cpu")
    layer = LayerCache(other.keys, other.values, 5, table[1])
    assert table[1].tolist() == layer.numbers()
    assert not table[0].any() and not table[2].any()


@pytest.mark.parametrize(
    "sizes", [{"batch": 3}, {"heads": 1}, {"key_dim": 8}, {"value_dim": 8}, {"dtype": F16}]
)
def test_another_cache_differs_in_capacity_alone(sizes: dict[str, Any]) -> None:
    layer, other = Call(0).layer("cpu"), Call(0, **sizes).layer("cpu")
    with pytest.raises(ValueError, match="capacity alone"):
        layer.point_to(other.keys, other.values)
    assert layer.keys.data_ptr() == int(layer.address[0])


def test_caches_that_an_address_does_not_describe_are_refused() -> None:
    keys = torch.zeros(1, 2, 10, 8)
    with pytest.raises(ValueError, match="differ"):
        LayerCache(keys, keys[:, :, :9])
    with pytest.raises(ValueError, match="device"):
        LayerCache(keys, keys.to("meta"))
    with pytest.raises(ValueError, match="contiguous"):
        LayerCache(keys[..., :4], keys[..., :4])
    with pytest.raises(ValueError, match="16 bytes"):
        LayerCache(keys.view(-1)[1:81].view(1, 1, 10, 8), keys.view(-1)[:80].view(1, 1, 10, 8))


#: What is changed of a call that is served, and a word of the reason.
REFUSED: dict[str, Any] = {
    "no elements": lambda a: {"query": a["query"][:0]},
    "one new token": lambda a: {"query": a["query"].expand(-1, -1, 2, -1)},
    "the query is": lambda a: {"query": a["query"].double()},
    "query and cache differ in dtype": lambda a: {"query": a["query"].half()},
    "batch, heads": lambda a: {"query": a["query"][:, :3]},
    "without": lambda a: {"value": None},
    "key and value differ": lambda a: {"key": a["key"].half()},
    "no token of the cache": lambda a: {"key": a["key"][:, :1]},
    "no slots": lambda a: {"size": 0},
    "the mask is torch": lambda a: {"mask": a["mask"].float()},
    "the mask is not \\(": lambda a: {"mask": a["mask"][:, 1:]},
    "the mask is not contiguous": lambda a: {"mask": a["mask"].expand(2, -1)},
    "one sink a head": lambda a: {"sinks": a["sinks"][1:]},
}
NAMES = (
    "query",
    "key",
    "value",
    "layer",
    "position",
    "size",
    "mask",
    "scaling",
    "softcap",
    "sinks",
)


@pytest.mark.parametrize("why", REFUSED, ids=str)
def test_refuses(why: str) -> None:
    arguments = dict(zip(NAMES, Call(50, mask="window", sinks=True).arguments("cpu")))
    assert KERNEL.why_fallback(*arguments.values()) is None
    reason = KERNEL.why_fallback(*(arguments | REFUSED[why](arguments)).values())
    assert why.replace("\\", "") in str(reason)


def test_refuses_wide_heads_and_tensors_of_several_devices() -> None:
    assert "above 512" in str(KERNEL.why_fallback(*Call(5, key_dim=520).arguments("cpu")))
    query, key, *rest = Call(5).arguments("cpu")
    assert CudaFusedDecodeAttention.why_fallback(query, key, *rest) is None
    reason = CudaFusedDecodeAttention.why_fallback(query, key.to("meta"), *rest)
    assert "device" in str(reason)
    assert query.dtype == F32
