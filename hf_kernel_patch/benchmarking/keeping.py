"""A model and the random numbers are afterwards as they were before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hf_kernel_patch.workload import seeded
from hf_kernel_patch.workload.keeping import modules_kept

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers, modes, attributes of modules and random numbers are put back at the end.

    Inside, the model begins without gradients. Weights are not copied: nothing here changes them.
    """
    gradients = [(one, one.grad) for one in model.parameters()]
    with seeded(0), modules_kept(model):
        try:
            for one, _ in gradients:
                one.grad = None
            yield
        finally:
            for one, gradient in gradients:
                one.grad = gradient
