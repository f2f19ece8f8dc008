"""Random numbers of one's own, of which nobody else's are changed."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_kernel_patch import devices


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed; the generators of torch, all devices, Python and NumPy are put back."""
    import torch

    kind = devices.current()
    own = kind if kind in ("cuda", "npu", "xpu") else "cuda"
    count = getattr(torch, own).device_count() if own == kind else 0
    numpy: Any = sys.modules.get("numpy")
    before, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(range(count), device_type=own):
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed % 2**32)  # it takes no larger one
            yield
    finally:
        random.setstate(before)
        if numpy:
            numpy.random.set_state(of_numpy)
