"""Launching the grouped products: the weights as the kernels read them, and the tiles to cover."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from hf_kernel_patch.ops._shared.launch import Launch, cdiv, launcher, processors
from hf_kernel_patch.ops.moe.experts import Experts
from hf_kernel_patch.ops.moe.triton.routing import Routing
from hf_kernel_patch.ops.moe.triton.tiles import Tile


class GroupedWeight(NamedTuple):
    """The weights of a product: every expert's parts (N, K), stacked or a tensor each."""

    weight: torch.Tensor  #: (E, parts * N, K), or the first part of the first expert
    offsets: torch.Tensor  #: where each part begins, (E, parts) int64; not read where stacked
    unit: int  #: the offsets count so many elements from the weight; 0 where stacked
    experts: int
    parts: int  #: two for gate and up, one for down
    n: int
    k: int


def grouped_weights(experts: Experts) -> tuple[GroupedWeight, GroupedWeight]:
    """The weights of gate_up and of down."""
    if not experts.listed:
        gate_up, down = experts.flat
        count, hidden, width = down.shape
        return (
            GroupedWeight(gate_up, gate_up, 0, count, 2, width, hidden),
            GroupedWeight(down, down, 0, count, 1, hidden, width),
        )
    count, (hidden, width) = experts.count, experts.sizes
    gates, ups, downs = experts.products
    pairs = [part for pair in zip(gates, ups) for part in pair]
    return (
        GroupedWeight(gates[0], *_offsets_of(pairs), count, 2, width, hidden),
        GroupedWeight(downs[0], *_offsets_of(downs), count, 1, hidden, width),
    )


def _offsets_of(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Where tensors begin, counted from the first of them, and the unit of that in elements."""
    first = parts[0]
    addresses = tuple(part.data_ptr() for part in parts)
    return _offsets_at(addresses, first.element_size(), first.device)


# Cached: training and decoding come back to the same weights, and a copy to the device takes time.
@lru_cache(maxsize=1024)
def _offsets_at(
    addresses: tuple[int, ...], itemsize: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    elements = [(address - addresses[0]) // itemsize for address in addresses]
    # Triton sees by the unit that rows begin at multiples of 16 bytes, and loads 16 at a time.
    unit = 8 if all(offset % 8 == 0 for offset in elements) else 1
    offsets = torch.tensor([offset // unit for offset in elements], dtype=torch.int64)
    return offsets.to(device), unit


def launch_over(
    kernel: Any,
    routing: Routing,
    tile: Tile,
    x: torch.Tensor,
    weight: GroupedWeight,
    tensors: tuple[torch.Tensor, ...],
    static: tuple[Any, ...],
    last: tuple[Any, ...] = (),
    *,
    columns: int,
    transpose: bool,
    x_is_sorted: bool = False,
) -> None:
    """Launch a product over the tiles of a routing.

    Args:
        x: what is multiplied by the weights; with ``x_is_sorted`` it has a row for each of the
            routing's, so that a tile's rows lie one after the other.
        tensors: the kernel's own, between the weights and the routing.
        static: its own constexprs, before those that all products have, and ``last`` after them.
        columns: of the output.
        transpose: whether the product is by the transposed weights, which are (N, K).
    """
    programs = processors(x.device) if tile.loops else routing.max_tiles * cdiv(columns, tile.n)
    described = tile.descriptor and not weight.unit and _describable(x, weight.weight)
    blocks = (tile.m, tile.n, tile.k, tile.group, *last)
    static = (*static, weight.unit, described, precision_of(x.dtype), *blocks)
    own = (x, weight.weight, weight.offsets, *tensors)
    if not described:
        launch = launcher_for(kernel, dtypes_of(*own), static, tile.warps, tile.stages)
        launch(programs, (*own, routing.ends, routing.tiles), (routing.max_tiles,))
        return
    # Descriptors are made anew for every launch, which goes through Triton as a launcher takes
    # pointers alone.
    given = (
        descriptor(x, (tile.m, tile.k)) if x_is_sorted else x,
        _weight_descriptor(weight, tile, transpose),
        *own[2:],
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    with torch.cuda.device(x.get_device()):  # which does nothing for -1, a CPU
        kernel[(programs,)](
            *given, routing.ends, routing.tiles, routing.max_tiles, *static, **options
        )


def descriptor(tensor: torch.Tensor, block: tuple[int, ...]) -> Any:
    """What a kernel takes to read blocks of a tensor by the tensor memory accelerator."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, list(block))


def _describable(*tensors: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read these: rows of whole 16 bytes."""
    return all(
        tensor.shape[-1] * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def _weight_descriptor(weight: GroupedWeight, tile: Tile, transpose: bool) -> Any:
    """Blocks of (N, K) or, not transposed, of (K, N); of gate and up together for their product."""
    if not transpose:
        return descriptor(weight.weight, (1, tile.k, tile.n))
    if weight.parts == 2:
        gates_and_ups = weight.weight.view(weight.experts * 2, weight.n, weight.k)
        return descriptor(gates_and_ups, (2, tile.n, tile.k))
    return descriptor(weight.weight, (1, tile.n, tile.k))


@cache
def launcher_for(
    kernel: Any,
    dtypes: tuple[torch.dtype, ...],
    static: tuple[Any, ...],
    warps: int,
    stages: int = 1,
    waits: bool = False,
) -> Launch:
    """The launcher for tensors of these dtypes."""
    return launcher(kernel, static, warps, stages, waits)


def dtypes_of(*tensors: torch.Tensor) -> tuple[torch.dtype, ...]:
    return tuple(tensor.dtype for tensor in tensors)


def precision_of(dtype: torch.dtype) -> str:
    """How float32 products are computed, as torch's own are."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"
