"""One family's tiny model: its class, weights that are worth comparing, what it is trained on."""

from __future__ import annotations

import importlib
import random
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import transformers

from hf_kernel_patch.workload.shrinking import shrink
from tests.families.inputs import KINDS


@dataclass(frozen=True)
class Case:
    """A class of a family, what its config has of its own, and the kind of its inputs."""

    family: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    inputs: str = "text"

    @property
    def id(self) -> str:
        return f"{self.family}-{self.name}"


def model_class(case: Case) -> Any:
    """The class, from the family's modelling module."""
    path = f"transformers.models.{case.family}.modeling_{case.family}"
    try:
        return getattr(importlib.import_module(path), case.name)
    except (AttributeError, ModuleNotFoundError):
        return getattr(transformers, case.name)


def reset_seeds() -> None:
    """For what is random in itself."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def tiny_model(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """The family's model with random weights, in training mode; the same at every call."""
    reset_seeds()
    kind = model_class(case)
    model = kind(shrink(kind.config_class, case.changes)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            odd = not parameter.isfinite().all() or parameter.abs().max() > 1e3
            if odd or (parameter.dim() > 1 and not parameter.any()):
                parameter.normal_(0, 0.1)  # nothing has initialised it, or to nothing
            if name.endswith("A_log"):
                parameter.uniform_(-3.0, -1.0)  # linear attention that remembers
            elif name.endswith((".gate.weight", ".router.weight")):
                parameter.mul_(16)  # a router that a rounding does not change the mind of
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(dtype)


def inputs_of(case: Case, model: Any) -> dict[str, Any]:
    """Inputs of a training step, labels among them."""
    found = KINDS[case.inputs](model)
    dtype = next(model.parameters()).dtype
    found = {
        name: value.to(dtype) if torch.is_floating_point(value) else value
        for name, value in found.items()
    }
    labels = found["input_ids"] if "input_ids" in found else KINDS["text"](model)["input_ids"]
    return {"labels": labels, **found}


def packed_inputs() -> dict[str, Any]:
    """Two sequences in one row, told from each other by their positions."""
    ids = KINDS["text"](None)["input_ids"][:1]
    positions = torch.cat([torch.arange(10), torch.arange(ids.shape[1] - 10)])[None]
    return {"input_ids": ids, "labels": ids, "position_ids": positions}
