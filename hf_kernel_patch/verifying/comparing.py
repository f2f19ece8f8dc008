"""How far results are from the truth, and whether ours are further than eager's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.errors import shown

if TYPE_CHECKING:
    import torch

    from hf_kernel_patch.verifying.measuring import Result

#: What may lie between eager's distance from the truth and ours, unless somebody says otherwise.
FACTOR = 3.0
#: A rounding to the nearest, as a part of the dtype's epsilon.
_ROUNDING = 0.25
#: What cancellation may leave of a gradient, beside the norm of all gradients, in epsilons.
_CANCELLED = 0.01


@dataclass(frozen=True)
class Measure:
    """One tensor: how far it is from the truth, as a part of the truth's norm.

    Attributes:
        name: of the output, the input or the parameter.
        gradient: whether it is a gradient.
        ours: ||ours - truth|| / ||truth||, of the patched code.
        eager: the same of the original code.
        limit: what ours may be: factor times eager's, and a rounding.
    """

    name: str
    gradient: bool
    ours: float
    eager: float
    limit: float

    @property
    def worse(self) -> bool:
        """Whether ours is further from the truth than it may be; also where it is no number."""
        return not self.ours <= self.limit

    @property
    def excess(self) -> float:
        """How much of what it may be ours is: above 1 it is worse."""
        return self.ours / self.limit if math.isfinite(self.ours) else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no infinity."""
        ours = self.ours if math.isfinite(self.ours) else None
        kind = "gradient" if self.gradient else "output"
        return {
            "name": self.name,
            "kind": kind,
            "ours": ours,
            "eager": self.eager,
            "limit": self.limit,
            "worse": self.worse,
        }


def check_factor(factor: object) -> float:
    """The factor, or the ValueError for what is none."""
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not number or not 1.0 <= factor < math.inf:  # type: ignore[operator]
        raise ValueError(f"factor is a number of at least 1, not {shown(factor)}")
    return float(factor)  # type: ignore[arg-type]


def compared(
    ours: Result, eager: Result, truth: Result, epsilon: float, factor: float
) -> list[Measure]:
    """Every output and gradient, worst first within its kind.

    Raises:
        ArithmeticError: eager's or the truth is no number, so there is nothing to compare with.
    """
    found = [
        _measure(name, False, ours.outputs.get(name), eager.outputs[name], one, epsilon, factor, 0)
        for name, one in truth.outputs.items()
        if name in eager.outputs
    ]
    norm = math.hypot(*(_norm(one) for one in truth.gradients.values() if one is not None), 0.0)
    for name, one in truth.gradients.items():
        held, given = ours.gradients.get(name), eager.gradients.get(name)
        if one is None and given is None and held is None:
            continue
        like = next(t for t in (one, given, held) if t is not None)
        true, near = (like.new_zeros(like.shape) if t is None else t for t in (one, given))
        found.append(_measure(name, True, held, near, true, epsilon, factor, norm))
    return sorted(found, key=lambda measure: -measure.excess)


def worst(measures: Iterable[Measure], gradient: bool) -> Measure | None:
    """The one of a kind that comes nearest to what it may be, or exceeds it most."""
    chosen = [one for one in measures if one.gradient is gradient]
    return max(chosen, key=lambda one: one.excess, default=None)


def mean(measures: Iterable[Measure], name: str, epsilon: float, factor: float) -> Measure | None:
    """One measure for the gradients of many parameters: the means of what each is off."""
    chosen = [one for one in measures if one.gradient]
    if not chosen:
        return None
    ours, eager = (sum(getattr(one, key) for one in chosen) for key in ("ours", "eager"))
    count = len(chosen)
    limit = factor * eager / count + _ROUNDING * epsilon
    return Measure(f"{name} ({count})", True, ours / count, eager / count, limit)


def epsilon_of(tensors: Iterable[torch.Tensor]) -> float:
    """The largest rounding of the floating tensors that a run is made of, in relative terms."""
    import torch

    found = {one.dtype for one in tensors if one.is_floating_point() and one.element_size() > 1}
    return max((torch.finfo(one).eps for one in found), default=torch.finfo(torch.float32).eps)


def _measure(
    name: str,
    gradient: bool,
    ours: torch.Tensor | None,
    eager: torch.Tensor,
    truth: torch.Tensor,
    epsilon: float,
    factor: float,
    all_gradients: float,
) -> Measure:
    if not bool(eager.isfinite().all()) or not bool(truth.isfinite().all()):
        whose = "eager's" if bool(truth.isfinite().all()) else "the float64 run's"
        raise ArithmeticError(f"{whose} {'gradient of ' if gradient else ''}{name} is not finite")
    held = eager.new_zeros(eager.shape) if ours is None else ours
    if held.shape != eager.shape:
        return Measure(name, gradient, math.inf, 0.0, 0.0)
    scale = _norm(truth)
    left = _CANCELLED * epsilon * all_gradients
    scale = scale or left or 1.0
    away, by_eager = (_norm(one.to(truth) - truth) / scale for one in (held, eager))
    # Few numbers may be nearer to the truth than their rounding, by luck.
    rounding = epsilon * max(_ROUNDING, truth.numel() ** -0.5)
    away = away if math.isfinite(away) else math.inf
    return Measure(name, gradient, away, by_eager, factor * by_eager + rounding + left / scale)


def _norm(tensor: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) if tensor.numel() else 0.0
