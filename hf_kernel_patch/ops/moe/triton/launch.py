"""The experts' weights, stacked or in lists, and launching products over the tiles of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from hf_kernel_patch.ops.launch import Launch, launcher, processors
from hf_kernel_patch.ops.moe.experts import Experts
from hf_kernel_patch.ops.moe.triton import products
from hf_kernel_patch.ops.moe.triton.routing import Plan
from hf_kernel_patch.ops.moe.triton.tiles import Tile


class Stack(NamedTuple):
    """The weights of a product: every expert's parts (N, K), stacked or a tensor each."""

    weight: torch.Tensor  #: (E, parts * N, K), or the first part of the first expert
    table: torch.Tensor  #: where each part lies, (E, parts) int64; the weight where stacked
    unit: int  #: the table counts so many elements from the weight; 0 where stacked
    experts: int
    parts: int
    n: int
    k: int


def stacks(experts: Experts) -> tuple[Stack, Stack]:
    """The weights of gate_up and of down."""
    count, (hidden, width) = experts.count, experts.sizes
    if not experts.listed:
        gate_up, down = experts.flat
        return (
            Stack(gate_up, gate_up, 0, count, 2, width, hidden),
            Stack(down, down, 0, count, 1, hidden, width),
        )
    gates, ups, downs = experts.products
    pairs = [part for pair in zip(gates, ups) for part in pair]
    return (
        Stack(gates[0], *_table(pairs), count, 2, width, hidden),
        Stack(downs[0], *_table(downs), count, 1, hidden, width),
    )


def _table(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    first = parts[0]
    places = tuple(part.data_ptr() for part in parts)
    return _placed(places, first.element_size(), first.device)


@lru_cache(maxsize=1024)
def _placed(
    places: tuple[int, ...], itemsize: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Where tensors lie from the first of them, and the elements in which that is counted."""
    elements = [(place - places[0]) // itemsize for place in places]
    unit = 8 if all(place % 8 == 0 for place in elements) else 1
    table = torch.tensor([place // unit for place in elements], dtype=torch.int64)
    return table.to(device), unit


def launch_over(
    kernel: Any,
    order: Plan,
    columns: int,
    tile: Tile,
    tensors: tuple[Any, ...],
    static: tuple[Any, ...],
    last: tuple[Any, ...] = (),
) -> None:
    """Launch a product over the tiles of a plan; its weights are the Stack among the tensors."""
    x, stack, *rest = tensors
    programs = processors(x.device) if tile.loops else order.most * -(-columns // tile.n)
    described = tile.descriptor and not stack.unit and _describable(x, stack.weight)
    blocks = (tile.m, tile.n, tile.k, tile.group, *last)
    static = (*static, stack.unit, described, precision_of(x.dtype), *blocks)
    pointers = (x, stack.weight, stack.table, *rest, order.ends, order.tiles)
    if not described:
        dtypes = dtypes_of(*pointers[:-2])
        launch = launcher_for(kernel, dtypes, static, tile.warps, tile.stages)
        launch(programs, pointers, (order.most,))
        return
    in_order = kernel is products.rows_kernel
    turn = static[3] if in_order else kernel is products.gate_up_kernel
    given = (
        products.descriptor(x, (tile.m, tile.k)) if in_order else x,
        _weight_descriptor(stack, tile, turn),
        *pointers[2:],
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    with torch.cuda.device(x.get_device()):  # which does nothing for -1, a CPU
        kernel[(programs,)](*given, order.most, *static, **options)


def _describable(*tensors: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read these: rows of whole 16 bytes."""
    return all(
        tensor.shape[-1] * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def _weight_descriptor(stack: Stack, tile: Tile, turn: bool) -> Any:
    weight = stack.weight
    if stack.parts == 2 and turn:
        gates_and_ups = weight.view(stack.experts * 2, stack.n, stack.k)
        return products.descriptor(gates_and_ups, (2, tile.n, tile.k))
    return products.descriptor(weight, (1, tile.n, tile.k) if turn else (1, tile.k, tile.n))


@cache
def launcher_for(
    kernel: Any,
    dtypes: tuple[torch.dtype, ...],
    static: tuple[Any, ...],
    warps: int,
    stages: int = 1,
) -> Launch:
    """The launcher for tensors of these dtypes."""
    return launcher(kernel, static, warps, stages)


def dtypes_of(*tensors: torch.Tensor) -> tuple[torch.dtype, ...]:
    return tuple(tensor.dtype for tensor in tensors)


def precision_of(dtype: torch.dtype) -> str:
    """How float32 products are computed, as torch's own are."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"
