"""What the autograd functions of the ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def eager_gradients(
    function: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Gradients of ``function(*tensors)`` through plain autograd, themselves differentiable.

    A backward written by hand calls this when gradients of gradients are asked for, that is while
    ``torch.is_grad_enabled()`` in the backward.
    """
    with torch.enable_grad():
        # Views, so that a tensor given twice, or one computed from another, is its own variable.
        tensors = [tensor.view_as(tensor) for tensor in tensors]
        outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    found = iter(
        torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True)
    )
    return [next(found) if tensor.requires_grad else None for tensor in tensors]
