"""decode_attention in Triton: splits and blocks, masks, caches that are exchanged, CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.decode_attention import CudaFusedDecodeAttention
from hf_kernel_patch.ops.decode_attention.memory import LayerCache
from hf_kernel_patch.ops.decode_attention.reference import decode_attention as reference
from tests.support.ops.cases_decode_attention import CASES, Call, Case
from tests.support.ops.checks import BF16, F16, F32, F64, check_backend, draw
from tests.support.ops.interpreted import DEVICE, GPU, MARKS, here, needs_gpu
from tests.support.tiny import error

pytestmark = MARKS
KERNEL = here(CudaFusedDecodeAttention)
#: The interpreter truncates to bf16.
SERVED = [case for case in CASES if GPU or "bf16" not in case.name]
LIMITS = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}


def launching() -> Any:
    """The module that lays the launches out."""
    return pytest.importorskip("hf_kernel_patch.ops.decode_attention.triton.op")


def check(arguments: tuple[Any, ...]) -> torch.Tensor:
    """Output, cache and counters of a call, against float64; returns the output."""
    query, key, value, layer, *rest = arguments
    copy = LayerCache(layer.keys.clone(), layer.values.clone(), layer.start)
    wide = reference(query.double(), key, value, copy, *rest, dtype=F64)
    found = KERNEL.load()(*arguments)
    assert found.dtype == query.dtype
    assert error(found, wide) < LIMITS[query.dtype]
    for ours, theirs in ((layer.keys, copy.keys), (layer.values, copy.values)):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert not layer.counters.any()
    return found


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_no_further_from_the_truth_than_hugging_face(case: Case) -> None:
    # The interpreter multiplies by numpy, whose sums have another order on each processor.
    check_backend(KERNEL, case, allowed=1.0 if GPU else 3.0)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("slot", [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 191, 192, 198, 199])
def test_slots_at_the_bounds_of_blocks_and_splits(slot: int, new: bool) -> None:
    check(Call(slot, batch=1, heads=2, new=new).arguments(DEVICE))


@pytest.mark.parametrize("mask", ["", "left padding", "window", "random", "old"])
@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("counted", [0, 1 << 20])
def test_any_way_to_split(
    mask: str, programs: int, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = launching()
    monkeypatch.setattr(module, "PROGRAMS_PER_SM", programs)
    monkeypatch.setattr(module, "COUNTED", counted)
    monkeypatch.setattr(module, "COMBINED", 32)  # two splits at a time
    monkeypatch.setattr(module, "tile_of", lambda *sizes: module.Tile(16, 1, 2))
    for slot in (0, 40, 199):
        check(Call(slot, batch=2, heads=1, mask=mask, sinks=True).arguments(DEVICE))


@pytest.mark.parametrize("scanned", [1, 4])
@pytest.mark.parametrize("mask", ["left padding", "window", "random", "old"])
def test_slots_that_are_not_allowed_are_not_read(
    mask: str, scanned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = launching()
    monkeypatch.setattr(module, "SCANNED", scanned)
    monkeypatch.setattr(module, "PROGRAMS_PER_SM", 1)
    monkeypatch.setattr(module, "tile_of", lambda *sizes: module.Tile(16, 1, 2))
    module._decode.cache_clear()
    arguments = Call(190, mask=mask, batch=3).arguments(DEVICE)
    layer, allowed = arguments[3], arguments[6]
    wanted = KERNEL.load()(*arguments)
    for tensor in (layer.keys, layer.values):
        hidden = ~allowed.expand(3, -1)[:, None, :, None]
        tensor.masked_fill_(hidden, torch.nan)
    assert wanted.isfinite().all()
    assert torch.equal(KERNEL.load()(*arguments), wanted)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("batch", [2, 9])
def test_nothing_allowed_gives_zeros(sinks: bool, batch: int) -> None:
    arguments = Call(150, mask="nothing", sinks=sinks, batch=batch).arguments(DEVICE)
    found = check(arguments)
    assert not found[0].any() and found[1:].all()


def test_pointers_that_are_not_aligned() -> None:
    query, key, value, *rest = Call(70).arguments(DEVICE)
    moved = []
    for tensor in (query, key, value):
        storage = torch.empty(tensor.numel() + 1, device=DEVICE)
        moved.append(storage[1:].view(tensor.shape).copy_(tensor))
    check((*moved, *rest))


def test_a_cache_grows_and_is_exchanged_under_one_address() -> None:
    """What the host knows of the cache's place is wrong, as in a graph that is replayed."""
    call = Call(100, capacity=130)
    first, second = call.layer(DEVICE), Call(100, capacity=300).layer(DEVICE, seed=50)
    layer = call.layer(DEVICE)
    address = layer.address
    for other, slot in ((first, 20), (first, 21), (second, 150), (first, 22), (second, 151)):
        other.keys.nan_to_num_(), other.values.nan_to_num_()
        address.copy_(other.address)
        tokens = call.tokens(DEVICE, seed=slot)
        position = torch.tensor([slot], device=DEVICE)
        copy = LayerCache(other.keys.clone(), other.values.clone())
        wide = reference(tokens[0].double(), *tokens[1:], copy, position, 200, dtype=F64)
        assert error(KERNEL.load()(*tokens, layer, position, 200), wide) < 2e-6
        assert torch.equal(other.keys, copy.keys) and torch.equal(other.values, copy.values)
        assert not layer.counters.any()


def test_another_length_asks_for_no_other_kernel() -> None:
    module = launching()
    for slot in (3, 64, 150):
        KERNEL.load()(*Call(slot).arguments(DEVICE))
        if slot == 3:
            before = module._decode.cache_info().currsize
    assert module._decode.cache_info().currsize == before


@needs_gpu
@pytest.mark.parametrize("counted", [0, 8192])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_a_cuda_graph_follows_lengths_and_caches(
    group: int, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching(), "COUNTED", counted)
    sizes: dict[str, Any] = {"heads": 4, "group": group, "key_dim": 64, "value_dim": 64}
    call = Call(0, dtype=BF16, size=700, capacity=700, **sizes)
    caches = [Call(0, dtype=BF16, capacity=n, **sizes).layer(DEVICE) for n in (300, 700)]
    for cache in caches:
        shape = cache.keys.shape
        cache.keys.copy_(draw(shape, BF16, seed=1, grad=False)), cache.values.normal_()
    layer, tokens = call.layer(DEVICE), call.tokens(DEVICE)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    arguments = (*tokens, layer, position, 700)
    KERNEL.load()(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = KERNEL.load()(*arguments)
    for step in range(60):
        cache = caches[step % 2]
        slot = step * (5 if step % 2 == 0 else 11)
        layer.point_to(cache.keys, cache.values, start=step)
        position.fill_(slot + step)
        for token in tokens:
            assert token is not None
            token.normal_()
        copy = LayerCache(cache.keys.clone(), cache.values.clone(), step)
        graph.replay()
        query, key, value = tokens
        assert query is not None
        wide = reference(query.double(), key, value, copy, position, 700, dtype=F64)
        assert error(found, wide) < LIMITS[BF16]
        assert torch.equal(cache.keys, copy.keys) and torch.equal(cache.values, copy.values)
        assert not layer.counters.any()


@needs_gpu
def test_offsets_beyond_31_bits() -> None:
    call = Call(299_000, batch=4, heads=16, key_dim=128, value_dim=128, dtype=F16)
    keys = torch.zeros(4, 16, 300_000, 128, dtype=F16, device=DEVICE)
    assert keys.numel() > 1 << 31
    keys[-1, -1, 298_000:].normal_()
    query, key, value = call.tokens(DEVICE)
    position = torch.tensor([299_000], device=DEVICE)
    found = KERNEL.load()(query, key, value, LayerCache(keys, keys), position, 300_000)
    assert query is not None and key is not None and value is not None
    assert torch.equal(keys[-1, -1, 299_000], value[-1, -1, 0])
    # The memory is that of both: at the new token's slot it holds the value.
    own = torch.cat((keys[-1, -1, :299_000], key[-1, -1]))
    wide = query[-1, -1].double() @ own.double().mT * 128**-0.5
    wanted = wide.softmax(-1) @ keys[-1, -1, :299_001].double()
    assert error(found[-1, 0, -1], wanted[0]) < 1e-2
