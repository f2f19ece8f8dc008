"""The tiles of the grouped products: data, by device, dtype and rows of an expert."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What a program computes at a time, and how.

    ``m`` rows; ``n`` columns, of gate and as many of up in the first product; steps of ``k``. With
    ``descriptor`` the tensor memory accelerator reads the weights, and rows that lie in order;
    with ``loops``, which ``down`` and ``hidden_backward`` may have, there are as many programs as
    multiprocessors, and each loops over tiles. ``group`` tiles of an expert's rows share a block of
    columns before the next one follows.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    descriptor: bool = False
    loops: bool = False
    group: int = 16


class Tiles(NamedTuple):
    """The tiles of every product; those over the rows of a routing have the same ``m``."""

    gate_up: Tile
    down: Tile
    inner_backward: Tile
    hidden_backward: Tile
    gate_up_weight: Tile
    down_weight: Tile
    #: Columns that the epilogue of ``inner_backward`` takes at a time.
    part: int = 64


def _alike(tile: Tile, weights: Tile | None = None, part: int = 64) -> Tiles:
    """One tile for all but the gradients of the weights, which may have another.

    Columns of gate and of up together are as many as the others'.
    """
    weights = weights or tile
    return Tiles(tile._replace(n=tile.n // 2), tile, tile, tile, weights, weights, part)


# With few rows an expert, the time goes into reading weights: few rows a tile, long steps. With
# many, into products: the largest tiles that registers hold, and in the end programs that loop.
#: Rows of an expert on average, up to so many -> tiles. 2-byte numbers on Hopper.
HOPPER: dict[int, Tiles] = {
    1: Tiles(
        gate_up=Tile(16, 64, 128, 4, 3, True),
        down=Tile(16, 64, 128, 4, 4, True),
        inner_backward=Tile(16, 64, 64, 4, 4, True),
        hidden_backward=Tile(16, 128, 64, 4, 4, True),
        gate_up_weight=Tile(128, 128, 32, 4, 4),
        down_weight=Tile(128, 128, 32, 4, 4),
    ),
    24: Tiles(
        gate_up=Tile(32, 64, 128, 8, 3, True),
        down=Tile(32, 128, 128, 8, 3, True),
        inner_backward=Tile(32, 64, 64, 4, 4, True),
        hidden_backward=Tile(32, 128, 64, 4, 4, True),
        gate_up_weight=Tile(128, 128, 32, 4, 4),
        down_weight=Tile(128, 128, 32, 4, 4),
    ),
    96: Tiles(
        gate_up=Tile(64, 128, 64, 4, 4, True),
        down=Tile(64, 256, 64, 4, 4, True),
        inner_backward=Tile(64, 128, 64, 4, 4, True),
        hidden_backward=Tile(64, 256, 64, 4, 4, True),
        gate_up_weight=Tile(128, 128, 32, 4, 4),
        down_weight=Tile(128, 128, 32, 4, 4),
    ),
    512: Tiles(
        gate_up=Tile(128, 128, 64, 8, 4, True),
        down=Tile(128, 256, 64, 8, 4, True),
        inner_backward=Tile(128, 256, 64, 8, 4, True),
        hidden_backward=Tile(128, 256, 64, 8, 4, True),
        gate_up_weight=Tile(128, 128, 32, 4, 4),
        down_weight=Tile(128, 128, 64, 4, 3),
    ),
    1 << 62: Tiles(
        gate_up=Tile(128, 128, 64, 8, 4, True),
        down=Tile(128, 256, 64, 8, 3, True, True),
        inner_backward=Tile(128, 256, 64, 8, 4, True),
        hidden_backward=Tile(128, 256, 64, 8, 3, True, True),
        gate_up_weight=Tile(128, 256, 64, 8, 3),
        down_weight=Tile(128, 256, 64, 8, 3),
    ),
}
#: 2-byte numbers on other devices.
PLAIN: dict[int, Tiles] = {
    24: _alike(Tile(16, 128, 64, 4, 3), Tile(64, 128, 32, 4, 3)),
    96: _alike(Tile(64, 128, 64, 4, 3)),
    1 << 62: _alike(Tile(128, 128, 32, 8, 3)),
}
#: float32, in which products are exact and slow; a short step makes for a small error.
WIDE: dict[int, Tiles] = {
    24: _alike(Tile(16, 64, 16, 4, 3), Tile(64, 64, 16, 8, 3)),
    1 << 62: _alike(Tile(64, 64, 16, 8, 3), part=32),
}
#: Under the interpreter.
INTERPRETED: dict[int, Tiles] = {
    4: _alike(Tile(16, 64, 32, 4, 1), part=16),
    1 << 62: _alike(Tile(32, 32, 16, 4, 1, group=2), part=16),
}


def choose(device: torch.device, dtype: torch.dtype, pairs: int, experts: int) -> Tiles:
    """The tiles for so many pairs over so many experts."""
    table = _table(device, dtype)
    rows = pairs / experts
    return next(tiles for max_rows, tiles in table.items() if rows <= max_rows)


@cache
def _table(device: torch.device, dtype: torch.dtype) -> dict[int, Tiles]:
    if device.type == "cpu":
        return INTERPRETED
    if dtype == torch.float32:
        return WIDE
    return HOPPER if _is_hopper(device) else PLAIN


def _is_hopper(device: torch.device) -> bool:
    """Whether there is a tensor memory accelerator, and a Triton that makes use of it."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0) and bool(
        find_spec("triton.tools.tensor_descriptor")
    )
