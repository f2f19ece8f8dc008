"""Laying out and launching the kernels."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from hf_kernel_patch.ops._shared.launch import Launch, cdiv, launcher, processors
from hf_kernel_patch.ops.decode_attention.memory import LayerCache
from hf_kernel_patch.ops.decode_attention.triton.combine import combine_kernel
from hf_kernel_patch.ops.decode_attention.triton.kernel import decode_kernel

#: So many programs a multiprocessor are launched, where there are slots for them. On an H100 one
#: did as well as two or better: more of them leave more to combine.
PROGRAMS_PER_SM = 1
#: The last program combines partial results of so many elements: one load of all of them. For more,
#: another launch costs less.
COUNTED = 8192
#: Elements that one program of that launch combines at a time.
COMBINED = 8192
#: Blocks of a program's mask that are looked at together.
SCANNED = 16


class Tile(NamedTuple):
    """Slots of a block, warps and stages of the pipeline."""

    block: int
    warps: int
    stages: int


class Layout(NamedTuple):
    """What Triton compiles the kernels for, beside dtypes."""

    tile: Tile
    heads: int  # of keys and values
    group: int
    key_dim: int
    value_dim: int
    new: bool
    masked: bool
    softcap: bool
    sinks: bool
    split: bool
    #: Partial results that the last program combines at a time; 0 for another launch.
    counted: int
    #: Elements that the strides of query, key and value are multiples of.
    unit: int
    interpreted: bool


def tile_of(key_dim: int, value_dim: int, element_size: int) -> Tile:
    """Blocks of 16 KB, two warps: the fastest on an H100 for heads of 64 and 128, half precision.

    Two warps wait for each other less than four. Wider heads fill their registers, though, and so
    do products in float32, without tensor cores.
    """
    row = (_power(key_dim) + _power(value_dim)) * element_size
    if element_size == 2 and row <= 512:
        block = min(64, 1 << ((16 << 10) // row).bit_length() - 1)
        return Tile(block, 2, 3 if block == 64 else 4)
    block = min(64, max(16, 1 << ((32 << 10) // row).bit_length() - 1))
    return Tile(block, 4 if element_size == 2 else 8, 3)


def _power(n: int, least: int = 16) -> int:
    """The least power of 2 that is not below n; tl.dot takes 16 at least."""
    return max(least, 1 << (n - 1).bit_length())


@cache
def _decode(dtypes: tuple[torch.dtype, ...], layout: Layout) -> Launch:
    """The launcher of decode_kernel for these dtypes."""
    dtype, tile, group = dtypes[0], layout.tile, layout.group
    # The interpreter does not compute in bfloat16.
    wide = dtype == torch.float32 or (layout.interpreted and dtype == torch.bfloat16)
    static = (
        *(layout.unit, layout.heads, group, layout.key_dim, layout.value_dim),
        *(layout.new, layout.masked, layout.softcap, layout.sinks, layout.split),
        *(layout.counted > 0, wide, _power(layout.key_dim), _power(layout.value_dim)),
        *(_power(group, 1), _power(group), max(1, layout.counted), SCANNED),
        *(tile.block, tile.stages),
    )
    return launcher(decode_kernel, static, tile.warps, tile.stages, waits=True)


@cache
def _combine(dtypes: tuple[torch.dtype, ...], layout: Layout, chunk: int) -> Launch:
    """The launcher of combine_kernel for these dtypes."""
    static = (
        *(layout.heads, layout.group, layout.value_dim, layout.sinks),
        *(_power(layout.value_dim), chunk, layout.tile.block),
    )
    return launcher(combine_kernel, static, 4, waits=True)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    layer: LayerCache,
    position: torch.Tensor,
    size: int,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.decode_attention.reference.decode_attention`.

    For CUDA graphs: nothing is read from the device by the host, and the cache is found by what is
    in ``layer.address`` when the kernel runs. ``size`` is what the launch is laid out for.
    """
    batch, heads, _, key_dim = query.shape
    key_heads, value_dim = layer.heads, layer.value_dim
    group, rows = heads // key_heads, batch * key_heads
    tile = tile_of(key_dim, value_dim, query.element_size())
    most = processors(query.device) * PROGRAMS_PER_SM
    splits = max(1, min(cdiv(size, tile.block), most // rows))
    counted = _power(splits, 1) if splits > 1 else 0
    if counted * _power(group, 1) * _power(value_dim) > COUNTED:
        counted = 0
    out = torch.empty((batch, 1, heads, value_dim), dtype=query.dtype, device=query.device)
    partial = out  # not used, as whatever stands for an argument that is None
    if splits > 1:
        elements = batch * heads * splits * (value_dim + 1)
        partial = torch.empty(elements, dtype=torch.float32, device=query.device)
    query = _dense_heads(query)
    key = query if key is None else _dense_heads(key)
    new = value is not None
    value = query if value is None else _dense_heads(value)
    strides = [*query.stride()[:2], *key.stride()[:2], *value.stride()[:2]]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    layout = Layout(
        tile, key_heads, group, key_dim, value_dim, new, mask is not None, softcap is not None,
        sinks is not None, splits > 1, counted, unit, query.device.type == "cpu",
    )  # fmt: skip
    dtypes = (query.dtype,) if sinks is None else (query.dtype, sinks.dtype)
    wide_mask = mask is not None and mask.shape[0] > 1
    mask = query if mask is None else mask
    sinks = query if sinks is None else sinks
    _decode(dtypes, layout)(
        rows * splits,
        (
            query, key, value, mask, sinks, layer.address, position, layer.counters, partial, out
        ),
        (
            splits,
            *(stride // unit for stride in strides),
            size if wide_mask else 0,
            key_dim**-0.5 if scaling is None else scaling,
            1.0 if softcap is None else softcap,
        ),
    )  # fmt: skip
    if splits > 1 and not counted:
        chunk = min(_power(splits, 1), COMBINED // _power(value_dim))
        launch = _combine(dtypes, layout, chunk)
        launch(batch * heads, (sinks, layer.address, position, partial, out), (splits,))
    return out


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy if the elements of a head do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
