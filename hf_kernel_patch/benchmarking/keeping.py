"""A model and the random numbers are afterwards as they were before."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import devices
from hf_kernel_patch.workload.keeping import modules_kept

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers, modes, attributes of modules and random numbers are put back at the end.

    Inside, the model begins without gradients. Weights are not copied: nothing here changes them.
    """
    gradients = [(one, one.grad) for one in model.parameters()]
    with _random_numbers(), modules_kept(model):
        try:
            for one, _ in gradients:
                one.grad = None
            yield
        finally:
            for one, gradient in gradients:
                one.grad = gradient


@contextmanager
def _random_numbers() -> Iterator[None]:
    import torch

    current = devices.current()
    kind = current if current in ("cuda", "npu", "xpu") else "cuda"  # those with a state a device
    count = getattr(torch, kind).device_count() if kind == current else 0
    numpy: Any = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(list(range(count)), device_type=kind):
            yield
    finally:
        random.setstate(of_python)
        if numpy:
            numpy.random.set_state(of_numpy)
