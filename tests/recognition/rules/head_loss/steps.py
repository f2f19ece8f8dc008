"""Training steps through head and loss: labels, all results, and the tensors of an output."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel.distributed import _find_tensors

from tests.support.tiny import error, tokens

LOSS = "linear_cross_entropy"


def labels(**changes: Any) -> torch.Tensor:
    """Labels of ``tokens()``, the first ten of a row and some others ignored."""
    found = tokens().clone()
    found[0, :10] = -100
    found[1, 3::4] = -100
    return found


def run(model: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """Everything in the output, and the gradients of the loss."""
    model.zero_grad()
    ids = () if "inputs_embeds" in options else (tokens(),)
    output = model(*(args or ids), **options)
    if output.loss.requires_grad:
        output.loss.sum().backward()
    found = {"class": type(output).__qualname__, "keys": list(output)}
    found |= {name: value for name, value in output.items() if torch.is_tensor(value)}
    found |= {f"hidden {i}": h for i, h in enumerate(output.get("hidden_states") or ())}
    cache = getattr(output.get("past_key_values"), "layers", ())
    found |= {f"cache {i}": layer.keys for i, layer in enumerate(cache) if hasattr(layer, "keys")}
    found |= {f"router {i}": r for i, r in enumerate(output.get("router_logits") or ())}
    return found | {
        f"gradient of {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def agree(inside: dict[str, Any], eager: dict[str, Any]) -> None:
    assert list(inside) == list(eager)
    for name, expected in eager.items():
        if not torch.is_tensor(expected):
            assert inside[name] == expected
            continue
        assert inside[name].shape == expected.shape, name
        assert inside[name].dtype == expected.dtype, name
        if "gradient" in name or name == "loss":
            assert torch.equal(inside[name].isnan(), expected.isnan()), name
            assert error(inside[name].detach().nan_to_num(), expected.detach().nan_to_num()) < 4e-6
        else:
            assert torch.equal(inside[name], expected), name


def walked(output: Any) -> list[torch.Tensor]:
    """The tensors of an output, as DistributedDataParallel finds them."""
    return list(_find_tensors(output))
