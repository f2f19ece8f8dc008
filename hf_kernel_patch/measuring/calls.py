"""What a call of an op tells of the step that it is a part of."""

from __future__ import annotations

from typing import Any


def in_backward() -> bool:
    """Whether autograd calls, as where activations are computed again."""
    import torch

    return torch._C._current_graph_task_id() != -1


def tokens_of(arguments: tuple[Any, ...]) -> int:
    """The tokens, or what else is as many: all but the last dimension of the first tensor."""
    shape: Any = getattr(arguments[0], "shape", None) if arguments else None
    return int(shape[:-1].numel()) if shape else 0


def is_token(arguments: tuple[Any, ...]) -> bool:
    """Whether a call is of one token of each sequence, with a cache of those before."""
    shape: Any = getattr(arguments[0], "shape", None) if arguments else None
    return bool(shape) and len(shape) > 2 and shape[-2] == 1
