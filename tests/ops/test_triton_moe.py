"""moe in Triton: routing, tiles, the ways for few tokens and for lists, autograd, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.moe import CudaFusedMoE
from hf_kernel_patch.ops.moe.reference import moe as reference
from tests.support.ops import cases_moe
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    F64,
    Case,
    check_backend,
    check_double_backward,
    check_saves_nothing,
    draw,
)
from tests.support.ops.interpreted import DEVICE, GPU, MARKS, here, needs_gpu
from tests.support.tiny import error

pytestmark = MARKS
MOE = here(CudaFusedMoE)
tiles = pytest.importorskip("hf_kernel_patch.ops.moe.triton.tiles")
pipeline = pytest.importorskip("hf_kernel_patch.ops.moe.triton.pipeline")
routing = pytest.importorskip("hf_kernel_patch.ops.moe.triton.routing")
EVEN, ODD, EXPERTS = cases_moe.EVEN, cases_moe.ODD, cases_moe.EXPERTS
SEVERAL = "several experts"
FROZEN = [(row[0], row[1]) for row in cases_moe.FROZEN[1:]]
#: The interpreter is slow, and does not know bf16.
CASES = (
    [case for case in cases_moe.CASES if "no token" not in case.name]
    if GPU
    else [
        *(cases_moe.case(route) for route in cases_moe.ROUTES if route != "no token"),
        *(cases_moe.case(SEVERAL, (F16, dtype), sizes=EVEN) for dtype in (F16, F32)),
        *(cases_moe.case(route, listed=True) for route in (SEVERAL, "experts without tokens")),
        cases_moe.case("experts of another rank", listed=True, sizes=EVEN),
        *(cases_moe.case(SEVERAL, activation=name) for name in ("gelu_tanh", "gelu")),
        cases_moe.case("one expert takes most", sizes=(32, 272)),
        cases_moe.case(SEVERAL, name="transposed", layout="transposed"),
        *(
            cases_moe.case(SEVERAL, name=str(poison), poison=poison)
            for poison in (float("nan"), float("inf"))
        ),
        *(cases_moe.case(SEVERAL, name=name, grads=grads) for name, grads in FROZEN),
        cases_moe.case(SEVERAL, name="only down", grads=(False, False, False, True)),
    ]
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_further_from_the_truth_than_hugging_face(case: Case) -> None:
    check_backend(MOE, case)


@pytest.mark.parametrize("holds", [check_double_backward, check_saves_nothing])
@pytest.mark.parametrize("listed", [False, True])
def test_autograd_holds(holds: Callable[..., None], listed: bool) -> None:
    holds(MOE, cases_moe.case(SEVERAL, listed=listed, sizes=EVEN))


def inputs(route: str = SEVERAL, dtype: torch.dtype = F32, **options: Any) -> tuple[Any, ...]:
    """Arguments of a case that need no gradient."""
    frozen = (False, False, False, False)
    return cases_moe.case(route, (dtype, dtype), grads=frozen, **options).inputs(DEVICE)[0]


def gradients(function: Any, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """The output and the gradients of hidden, weights, gate_up and down."""
    hidden, index, weights, *rest = arguments
    leaves = [x.detach().requires_grad_() for x in (hidden, weights, *rest[:2])]
    out = function(leaves[0], index, *leaves[1:], rest[2])
    upstream = draw(tuple(out.shape), out.dtype, seed=4, grad=False, device=DEVICE)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "top", "experts"), [(1, 1, 1), (7, 2, 5), (600, 2, 6), (70, 8, 33)]
)
def test_routing_is_a_stable_sort(tokens: int, top: int, experts: int, block: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    index = torch.randint(0, experts + 1, (tokens, top), generator=generator)
    flat = index.flatten()
    order = flat.argsort(stable=True)
    order = order[flat[order] < experts]
    counts = flat.bincount(minlength=experts)[:experts]
    found = routing.route(index.to(DEVICE), experts, block)
    assert torch.equal(found.pairs.cpu()[: len(order)], order.int())
    rows = torch.full_like(flat, -1)
    rows[order] = torch.arange(len(order))
    assert torch.equal(found.rows.cpu(), rows.int())
    assert torch.equal(found.ends.cpu(), counts.cumsum(0).int())
    starts = counts.cumsum(0) - counts
    tiles = [
        (expert, row)
        for expert in range(experts)
        for row in range(int(starts[expert]), int(starts[expert] + counts[expert]), block)
    ]
    number = int(found.tiles[-1])
    assert number == len(tiles) <= found.max_tiles
    owners, firsts = (found.tiles[i * found.max_tiles :][:number].tolist() for i in range(2))
    assert list(zip(owners, firsts, strict=True)) == tiles


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_the_same_bits_at_every_run(index: torch.dtype) -> None:
    hidden, chosen, *rest = inputs("many tokens" if GPU else "a token whose experts repeat")
    runs = [gradients(MOE.load(), (hidden, chosen.to(index), *rest)) for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def described(table: dict[int, Any]) -> dict[int, Any]:
    """The same tiles with descriptors, and with loops where a kernel has one."""
    loops = {"down", "hidden_backward"}
    return {
        rows: given._replace(
            **{
                name: tile._replace(descriptor=True, loops=name in loops)
                for name, tile in given._asdict().items()
                if name != "part"
            }
        )
        for rows, given in table.items()
    }


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights through tensor descriptors, as on Hopper."""
    monkeypatch.setattr(tiles, "INTERPRETED", described(tiles.INTERPRETED))
    tiles._table.cache_clear()
    yield
    tiles._table.cache_clear()


@pytest.mark.skipif(GPU, reason="a GPU has its own tiles")
@pytest.mark.parametrize("route", [SEVERAL, "experts of another rank"])
@pytest.mark.usefixtures("descriptors")
def test_descriptors_read_the_same_weights(route: str) -> None:
    found = gradients(MOE.load(), inputs(route, sizes=EVEN))
    wide = [x.double() if x.is_floating_point() else x for x in inputs(route, sizes=EVEN)[:5]]
    truth = gradients(lambda *a: reference(*a, dtype=F64), (*wide, "silu"))
    assert all(error(one, two) <= 1e-6 for one, two in zip(found, truth, strict=True))


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    "route", ["one token", SEVERAL, "experts of another rank", "a token whose experts repeat"]
)
def test_few_tokens_take_a_way_of_their_own(
    route: str, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = inputs(route, dtype, activation=activation)
    monkeypatch.setattr(pipeline, "FEW", -1)
    sorted_rows = MOE.load()(*arguments)
    monkeypatch.setattr(pipeline, "FEW", arguments[1].numel())
    monkeypatch.setattr(pipeline, "route", None)
    assert error(MOE.load()(*arguments), sorted_rows) <= (1e-6 if dtype is F32 else 1e-3)


@needs_gpu  # the interpreter multiplies the bits of bf16
def test_bf16_is_near_float64() -> None:
    arguments = inputs(dtype=BF16, sizes=EVEN)
    wide = [x.double() if x.is_floating_point() else x for x in arguments[:5]]
    truth = gradients(lambda *a: reference(*a, dtype=F64), (*wide, "silu"))
    found = gradients(MOE.load(), arguments)
    assert all(error(one, two) <= 6e-3 for one, two in zip(found, truth, strict=True))


def test_no_token_gives_nothing_and_zero_gradients() -> None:
    found = gradients(MOE.load(), inputs("no token"))
    assert found[0].shape == (0, ODD[0])
    assert not any(grad.any() for grad in found[1:])


def test_lists_are_read_where_they_lie_after_they_moved() -> None:
    hidden, index, weights, pairs, downs, activation = inputs(listed=True)
    first = MOE.load()(hidden, index, weights, pairs, downs, activation)
    moved = [(gate.clone(), up.clone()) for gate, up in pairs], [down.clone() for down in downs]
    for gate, up in pairs:
        gate.fill_(float("nan"))
        up.fill_(float("nan"))
    assert torch.equal(MOE.load()(hidden, index, weights, *moved, activation), first)


def test_lists_whose_weights_start_at_odd_places() -> None:
    hidden, index, weights, pairs, downs, activation = inputs(listed=True)
    wanted = MOE.load()(hidden, index, weights, pairs, downs, activation)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        storage = torch.cat((tensor.new_zeros(3), tensor.flatten()))
        return storage[3:].view_as(tensor)

    odd = [(shifted(gate), up) for gate, up in pairs], [shifted(down) for down in downs]
    assert torch.equal(MOE.load()(hidden, index, weights, *odd, activation), wanted)


@pytest.mark.parametrize("listed", [False, True])
def test_compiles_as_one_graph_whatever_the_token_count(listed: bool) -> None:
    torch._dynamo.reset()
    function = torch.compile(MOE.load(), fullgraph=True, backend="aot_eager", dynamic=True)
    for route in ("several experts", "a token whose experts repeat"):
        arguments, _ = cases_moe.case(route, listed=listed, sizes=EVEN).inputs(DEVICE)
        leaves = leaves_of(arguments)
        outs = [f(*arguments) for f in (function, MOE.load())]
        assert torch.equal(*outs)
        compiled, plain = (
            torch.autograd.grad(out.sum(), leaves, allow_unused=True) for out in outs
        )
        for one, two in zip(compiled, plain, strict=True):
            # In a graph an expert that no token chose has a gradient of zeros.
            assert not one.any() if two is None else torch.equal(one, two)


def leaves_of(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    flat = torch.utils._pytree.tree_leaves(arguments)
    return [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]


def test_checkpointing_recomputes_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    function = MOE.load()
    plain = gradients(function, inputs(sizes=EVEN))
    again = gradients(
        lambda *arguments: checkpoint(function, *arguments, use_reentrant=False),
        inputs(sizes=EVEN),
    )
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(keep: bool) -> None:
    hidden, index, weights, gate_up, down, activation = inputs(sizes=EVEN)
    MOE.load()
    leaves = [x.detach().requires_grad_(keep) for x in (hidden, weights, gate_up, down)]
    operator = torch.ops.hf_kernel_patch.moe.default
    arguments = (leaves[0], index, leaves[1], leaves[2:], activation, keep)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h, w: (h.half(), w), "differ in dtype"),
        (lambda h, w: (h, w.to("meta")), "another device"),
        (lambda h, w: (h, w.mT), "not contiguous"),
    ],
)
def test_refuses_experts_that_the_kernels_cannot_read(
    change: Callable[..., Any], reason: str
) -> None:
    hidden, index, weights, gate_up, down, activation = inputs(sizes=EVEN)
    assert MOE.why_fallback(hidden, index, weights, gate_up, down, activation) is None
    hidden, gate_up = change(hidden, gate_up)
    assert reason in str(MOE.why_fallback(hidden, index, weights, gate_up, down, activation))


@needs_gpu
def test_refuses_many_rows_in_exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs("many tokens")
    assert MOE.why_fallback(*arguments) is None
    monkeypatch.setattr(MOE, "most_exact_rows", 16)
    assert "exact float32" in str(MOE.why_fallback(*arguments))
    assert MOE.why_fallback(*inputs("many tokens", BF16)) is None


@pytest.mark.parametrize("table", ["HOPPER", "PLAIN", "WIDE", "INTERPRETED"])
def test_tiles_fit_each_other_and_the_shared_memory(table: str) -> None:
    size, memory = (
        (4, 48 << 10) if table == "WIDE" else (2, (227 if table == "HOPPER" else 96) << 10)
    )
    for given in getattr(tiles, table).values():
        by_row = given[:4]  # over the rows of one plan
        assert {tile.m for tile in by_row} == {given.gate_up.m}
        assert given.inner_backward.n <= 4 * given.part
        for tile in given[:6]:
            columns = tile.n * (2 if tile is given.gate_up else 1)
            assert tile.stages * tile.k * (tile.m + columns) * size <= memory
            assert not tile.loops or tile in (given.down, given.hidden_backward)


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_a_cuda_graph_replays_it_with_other_routes(tokens: int) -> None:
    hidden, index, weights, *rest = inputs("many tokens", BF16, sizes=EVEN)
    hidden, index, weights = hidden[:tokens], index[:tokens] % EXPERTS, weights[:tokens]
    MOE.load()(hidden, index, weights, *rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = MOE.load()(hidden, index, weights, *rest)
    index.copy_((index + 1) % EXPERTS)
    graph.replay()
    assert torch.equal(found, MOE.load()(hidden, index, weights, *rest))
