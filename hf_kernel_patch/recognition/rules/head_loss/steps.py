"""What a model does to its logits between head and loss, and which of it the op can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: The name of what is done, and what by: ("/", 2.0), ("tanh",), ("first", 100) or ("module", cap).
Step = tuple[Any, ...]
#: All that is done to the logits between head and loss, in this order.
Steps = tuple[Step, ...]


def apply(
    logits: torch.Tensor,
    name: str,
    by: float | int | torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The logits after one step.

    They are divided or multiplied ("/", "*"), capped ("tanh"), upcast ("float"), made contiguous,
    reduced to those of the first tokens of the vocabulary ("first"), or given to a module.
    """
    import torch

    match name:
        case "/":
            return logits / by
        case "*":
            return logits * by
        case "tanh":
            return torch.tanh(logits)
        case "float":
            return logits.float()
        case "contiguous":
            return logits.contiguous()
        case "first":
            return logits[..., :by]
    return by(logits)  # type: ignore[misc, operator]


def apply_all(steps: Steps, logits: torch.Tensor) -> torch.Tensor:
    """The logits after these steps."""
    for step in steps:
        logits = apply(logits, *step)
    return logits


def is_known(name: str, by: object = None) -> bool:
    """Whether the op may know such a step."""
    match name:
        case "/" | "*":
            return type(by) in (int, float) and bool(by)
        case "first":
            return type(by) is int and by > 0
    return name != "module"


def scale_and_cap(steps: Steps) -> tuple[float, float | None] | None:
    """The factor of the logits and the cap of their size, as the op takes them.

    ("/", c), ("tanh",), ("*", c) are a cap, after which no other factor may come; None for steps
    that the op does not have.
    """
    factors = [step for step in steps if step[0] not in ("float", "contiguous", "first")]
    cap = None
    if ("tanh",) in factors:
        if len(factors) < 3 or factors[-2] != ("tanh",) or factors[-3][0] != "/":
            return None
        if factors[-1] != ("*", cap := factors[-3][1]):
            return None
        del factors[-3:]
    scale = 1.0
    for name, *by in factors:
        if not by:  # capped twice
            return None
        scale = scale / by[0] if name == "/" else scale * by[0]
    return scale, cap if cap is None else float(cap)
