"""Linear layers of few rows in Triton, several in one launch.

Few rows of x are multiplied element by element; more rows go to the tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from hf_kernel_patch.ops._shared.launch import cdiv
from hf_kernel_patch.ops._shared.triton_early import has_early_launch
from hf_kernel_patch.ops.decode_linear.triton_kernels import (
    gated_kernel,
    linears_kernel,
)
from hf_kernel_patch.ops.swiglu.triton import CODES

#: Most rows of x, and most weights of one launch.
MOST_ROWS, MOST_WEIGHTS = 32, 8


class Tiling(NamedTuple):
    """What a program takes."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    #: Of the pipeline in front of the tensor cores; 0 multiplies element by element.
    stages: int = 0
    #: Whether a launch may start before the one before has ended.
    early: bool = True


def tiling(rows: int, k: int, ns: Sequence[int], itemsize: int) -> Tiling:
    """The tiling for so many rows, weights (n, k) for each n, and bytes of an element."""
    block_m, n = triton.next_power_of_2(rows), sum(ns)
    most_k = max(triton.next_power_of_2(k), 16)
    if _is_elementwise(rows, k, n):
        block_k = 1024 if rows > 2 or (len(ns) > 1 and k <= 2048) else 2048
        return Tiling(block_m, 2, min(block_k, most_k), 4 if block_k == 1024 or k > 8192 else 8)
    block_n, block_k, warps = (64, 256, 4) if n > 8192 and k <= 8192 else (16, 512, 2)
    return Tiling(max(block_m, 8), block_n, min(block_k // itemsize, most_k), warps, 4, rows <= 8)


def _is_elementwise(rows: int, k: int, n: int) -> bool:
    """Whether not to use tensor cores, which need a tile of 16 rows of a weight."""
    return rows <= 2 or (rows <= 4 and k <= 8192 and n <= 1 << 15)


def pays(rows: int, k: int, ns: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether :func:`linears` or :func:`gated` is faster than cuBLAS, one weight after the other.

    As measured on an H100 for the layers of models of 1 to 30 billion parameters.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype == torch.float32 and rows == 1
    if rows > MOST_ROWS or not 0 < len(ns) <= MOST_WEIGHTS:
        return False
    # A few long rows are too few programs; cuBLAS splits K.
    return rows <= 2 or len(ns) > 1 or k < 4 * ns[0] or (rows <= 4 and ns[0] <= 1024)


def _launch(
    kernel: Any,
    programs: int,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor],
    n: Any,
    static: int,
    tiles: Tiling,
) -> None:
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    early = tiles.early and has_early_launch(x.device)
    with torch.cuda.device_of(x):  # nothing to change for a tensor on the CPU
        kernel[(programs,)](
            flat,
            tuple(weights),
            tuple(weights[0] if bias is None else bias for bias in biases),
            tuple(outs),
            n,
            tuple(weight.stride(0) for weight in weights),
            flat.stride(0),
            len(flat),
            static,
            sum(1 << i for i, bias in enumerate(biases) if bias is not None),
            *(x.shape[-1], *tiles[:3], tiles.stages, early),
            num_warps=tiles.warps,
            **({"launch_pdl": True} if early else {}),
        )


def _empty(x: torch.Tensor, n: int) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)


def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    tiles: Tiling | None = None,
) -> list[torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.decode_linear.reference.linears`, in one launch.

    Args:
        x: (..., K) of 1 to ``MOST_ROWS`` rows.
        weights: 1 to ``MOST_WEIGHTS``, each (N, K) of x's dtype with contiguous rows. The launch
            just before must not write them: they are read while it is still running.
        biases: as many; (N,), contiguous and of x's dtype, or None.
        tiles: another tiling than the measured one.
    """
    ns = [weight.shape[0] for weight in weights]
    rows, k = x.numel() // x.shape[-1], x.shape[-1]
    tiles = tiles or tiling(rows, k, ns, x.element_size())
    outs = [_empty(x, n) for n in ns]
    programs = sum(cdiv(n, tiles.block_n) for n in ns)
    _launch(linears_kernel, programs, x, weights, biases, outs, tuple(ns), len(ns), tiles)
    return outs


def gated(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    activation: str = "silu",
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    tiles: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.decode_linear.reference.gated`, in one launch.

    The arguments are as those of :func:`linears`.
    """
    n, k = gate_weight.shape
    tiles = tiles or tiling(x.numel() // k, k, (n, n), x.element_size())
    gate, up, product = outs = _empty(x, n), _empty(x, n), _empty(x, n)
    weights, biases = (gate_weight, up_weight), (gate_bias, up_bias)
    programs = cdiv(n, tiles.block_n // 2)
    _launch(gated_kernel, programs, x, weights, biases, outs, n, CODES[activation], tiles)
    return gate, up, product
