"""Random tensors of every layout and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype = F32,
    *,
    seed: int = 0,
    layout: str = "contiguous",
    scale: float = 1.0,
    poison: float | None = None,
    grad: bool = True,
    device: str = "cpu",
) -> torch.Tensor:
    """A normal random tensor of a layout; ``poison`` takes the place of one element."""
    stored, view = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(stored(shape), generator=generator, dtype=F64) * scale
    if poison is not None:
        base.view(-1)[base.numel() // 3] = poison
    return view(base.to(device, dtype), shape).requires_grad_(grad)


#: name -> (shape that is stored, view of the wanted shape).
LAYOUTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "contiguous": (lambda s: s, lambda x, s: x),
    "transposed": (lambda s: (s[-1], *s[:-1]), lambda x, s: x.movedim(0, -1)),
    "heads": (lambda s: (s[0], s[2], s[1], *s[3:]), lambda x, s: x.transpose(1, 2)),
    "half": (lambda s: (*s[:-1], 2 * s[-1]), lambda x, s: x[..., s[-1] :]),
    "sliced": (lambda s: (*s[:-1], 2 * s[-1]), lambda x, s: x[..., ::2]),
    "expanded": (lambda s: (1, *s[1:]), lambda x, s: x.expand(s)),
}
