"""Random inputs of an op, and what it gives for them in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.workloads.ops import Arguments, Op
from benchmarks.workloads.shapes import Case


@dataclass
class Inputs:
    """The arguments in use, and the sets of values that rounds take turns in restoring to them.

    Restored each time, as some peers write over their inputs and gradients.
    """

    arguments: Arguments
    differentiable: list[torch.Tensor]
    values: list[list[torch.Tensor]]
    gradients: list[torch.Tensor] = field(default_factory=list)
    gradient_values: list[list[torch.Tensor]] = field(default_factory=list)

    def tensors(self) -> list[torch.Tensor]:
        return [value for value in vars(self.arguments).values() if torch.is_tensor(value)]

    def restore(self, turn: int, gradients: bool = True) -> None:
        """Put the values of a round into the arguments, and into the outputs' gradients."""
        with torch.no_grad():
            place = turn % len(self.values)
            for tensor, value in zip(self.tensors(), self.values[place], strict=True):
                tensor.copy_(value)
            if gradients and self.gradients:
                for tensor, value in zip(self.gradients, self.gradient_values[place], strict=True):
                    tensor.copy_(value)


def make_inputs(op: Op, case: Case, device: str, dtype: torch.dtype, sets: int = 2) -> Inputs:
    """Random arguments; the floating ones of ``op.differentiable`` are leaves."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    drawn = [op.inputs(case.sizes, draw) for _ in range(sets)]
    values = [[value for value in one.values() if torch.is_tensor(value)] for one in drawn]
    arguments = Arguments()
    for name, value in drawn[0].items():
        if torch.is_tensor(value):
            value = value.clone()  # of the same strides
            if name in op.parameters:
                value = torch.nn.Parameter(value)
            elif name in op.differentiable:
                value.requires_grad_()
        setattr(arguments, name, value)
    return Inputs(arguments, [getattr(arguments, name) for name in op.differentiable], values)


def truth(op: Op, inputs: Inputs, backward: bool) -> dict[str, torch.Tensor]:
    """Outputs and, with ``backward``, gradients in float64, of the first set of values."""
    inputs.restore(0)
    wide: dict[str, Any] = {}
    for name, value in vars(inputs.arguments).items():
        if torch.is_tensor(value) and value.is_floating_point():
            value = value.detach().double().requires_grad_(backward and name in op.differentiable)
        wide[name] = value
    with torch.set_grad_enabled(backward):
        outputs = as_tuple(op.truth(*wide.values()))
    found = dict(zip(op.outputs, (out.detach() for out in outputs), strict=True))
    if not backward:
        return found
    if not inputs.gradients:
        sets = range(len(inputs.values))
        narrow = inputs.differentiable[0]
        inputs.gradient_values = [
            [torch.ones_like(out) if out.dim() == 0 else _like(out, narrow) for out in outputs]
            for _ in sets
        ]
        inputs.gradients = [value.clone() for value in inputs.gradient_values[0]]
    gradients = torch.autograd.grad(
        outputs,
        [wide[name] for name in op.differentiable],
        [gradient.double() for gradient in inputs.gradients],
    )
    return found | dict(zip((f"d {name}" for name in op.differentiable), gradients, strict=True))


def _like(out: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """A random gradient of the output's shape and strides, in the dtype of the inputs."""
    return torch.randn_like(out, dtype=narrow.dtype)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
