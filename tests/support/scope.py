"""What the tests of the scope of one model share: what a model holds, compared by identity."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import hf_kernel_patch
from tests.support.probes import logits
from tests.support.tiny import modelling, tiny_model

NORM, ROPE = "torch_fused_rmsnorm", "torch_fused_rope"
SWIGLU, MOE = "torch_fused_swiglu", "torch_fused_moe"
LOSS = "torch_fused_linear_cross_entropy"
LAYERS = f"{NORM},{ROPE},{SWIGLU}"
#: With ``kernels``, attention holds a module of a local class, and nobody can pickle the model.
needs_pickle = pytest.mark.skipif(
    not inspect.isfunction(modelling("llama").apply_rotary_pos_emb),
    reason="with the package kernels, models of this transformers cannot be pickled",
)


def build(name: str) -> Any:
    """A tiny model that has a site for every row; of Qwen3-MoE, with one dense layer."""
    return tiny_model(
        name, **({"mlp_only_layers": [0]} if name in ("qwen3_moe", "qwen3_vl_moe") else {})
    )


def called() -> list[Any]:
    """The rows in force of what a forward calls; generate has one of its own."""
    return [row for row in hf_kernel_patch.status() if not row.site.endswith("_for_decode")]


def state(model: Any) -> dict[tuple[str, ...], Any]:
    """Classes, attributes, and what the attributes hold that are mappings: children and hooks.

    For ``same``, which compares by identity and, as ``state_dict`` shows it, in order.
    """
    found: dict[tuple[str, ...], Any] = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        for attribute, value in vars(module).items():
            if attribute == "rope_deltas":  # what the last call of a model that sees left behind
                continue
            found[name, "attribute", attribute] = value
            if isinstance(value, dict):
                found |= {(name, attribute, str(key)): held for key, held in value.items()}
    return found


def same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Whether two states hold the very same objects, children and parameters in the same order."""
    order = [
        [key for key in one if key[1] in ("_modules", "_parameters", "_buffers")]
        for one in (now, before)
    ]
    return identical(now, before) and order[0] == order[1]


def identical(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Whether two mappings have the same keys and the very same values."""
    return now.keys() == before.keys() and all(now[name] is before[name] for name in now)


def shared(name: str) -> dict[str, dict[str, Any]]:
    """What all models of an architecture share: its module's globals and its classes' members."""
    module = modelling(name)
    classes = {key: value for key, value in vars(module).items() if isinstance(value, type)}
    return {"": dict(vars(module))} | {key: dict(vars(value)) for key, value in classes.items()}


def unchanged(name: str, before: dict[str, dict[str, Any]]) -> bool:
    now = shared(name)
    return all(identical(now[key], before[key]) for key in before)


def kinds(model: Any) -> list[type]:
    return [type(module) for module in model.modules()]


def close(model: Any, eager: torch.Tensor) -> None:
    torch.testing.assert_close(logits(model), eager, rtol=1e-5, atol=1e-6)


def parts_of(model: Any) -> list[Any]:
    """Every module but the activations, whose hooks and classes need the original."""
    return [module for module in model.modules() if "SiLU" not in type(module).__name__]
