"""Random numbers of one's own, of which nobody else's are changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from hf_kernel_patch import devices


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed; the generators of torch, of all devices, and of Python are put back."""
    import torch

    kind = devices.current()
    own = kind if kind in ("cuda", "npu", "xpu") else "cuda"
    count = getattr(torch, own).device_count() if own == kind else 0
    before = random.getstate()
    try:
        with torch.random.fork_rng(range(count), device_type=own):
            torch.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(before)
