"""Which dtypes the ops take."""

from __future__ import annotations

import torch

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def why_not_floating(*tensors: torch.Tensor) -> str | None:
    """The reason to refuse a tensor of another dtype than float32, float16 and bfloat16."""
    for tensor in tensors:
        if tensor.dtype not in FLOATING:
            return f"a tensor is {str(tensor.dtype).removeprefix('torch.')}"
    return None
