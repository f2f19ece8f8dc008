"""A model, its random numbers and all patches are afterwards as before, whatever happens."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_kernel_patch
from hf_kernel_patch.benchmarking.keeping import kept
from hf_kernel_patch.recognition import site
from tests.benchmarking.benches import Progress, batch, measured, swiglu_that
from tests.support.probes import NORM, changed, places
from tests.support.tiny import outputs_and_gradients, tiny_model


def state_of(model: Any) -> dict[str, Any]:
    """All that may not change, as what can be compared."""
    modules = list(model.modules())
    return {
        "modes": [one.training for one in modules],
        "attributes": [
            {name: id(value) for name, value in vars(one).items() if name[0] != "_"}
            for one in modules
        ],
        "weights": [(id(one), one._version, one.requires_grad) for one in model.parameters()],
        "gradients": [id(one.grad) for one in model.parameters()],
        "buffers": [(id(one), one.tolist()) for one in model.buffers()],
        "hooks": [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in modules],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[2]),
        "counting": site.counting,
        "collection": (gc.isenabled(), gc.get_freeze_count()),
        "grad": torch.is_grad_enabled(),
    }


def model_in_use() -> Any:
    """With gradients, dropout, a part in another mode than the rest, and one that is frozen."""
    model: Any = tiny_model("llama", attention_dropout=0.5)
    outputs_and_gradients(model)
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("end", ["done", "interrupted", "in a kernel"])
def test_nothing_is_changed_whichever_way_it_ends(end: str) -> None:
    model = model_in_use()
    calls = 0

    def interrupt(text: str = "") -> None:
        nonlocal calls
        calls += 1
        if (end == "interrupted" and "round 2" in text) or (end == "in a kernel" and calls > 9):
            raise KeyboardInterrupt

    before, originals, values = state_of(model), places(), [*map(torch.clone, model.parameters())]
    told = Progress(interrupt if end == "interrupted" else lambda text: None)
    with swiglu_that(interrupt if end == "in a kernel" else lambda: None):
        if end == "done":
            measured(model, told=told)
        else:
            with pytest.raises(KeyboardInterrupt):
                measured(model, told=told)
    assert state_of(model) == before
    assert not changed(originals) and not hf_kernel_patch.status().rows
    assert all(map(torch.equal, values, model.parameters()))
    again = outputs_and_gradients(model.eval())
    assert torch.isfinite(again["loss"])


def test_every_call_draws_the_same_random_numbers() -> None:
    seen: list[int] = []
    model: Any = tiny_model("llama", attention_dropout=0.5)
    handle = model.register_forward_pre_hook(
        lambda module, arguments: seen.append(hash(tuple(torch.get_rng_state().tolist())))
    )
    measured(model, include=NORM, decode=0)
    handle.remove()
    assert len(seen) > 8 and len(set(seen)) == 1


class Keeping(nn.Module):
    """Changes itself in its forward, in every way that models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("frequency", torch.ones(2))
        self.longest = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.longest = 7
        self._cache = x
        self.register_buffer("frequency", torch.zeros(2))
        self.register_buffer("other", torch.zeros(2))
        return self.norm(x)


def test_what_a_forward_leaves_in_a_module_goes_again() -> None:
    model = Keeping()
    before, mean = {**vars(model)}, model.norm.running_mean
    frequency = model.frequency
    with kept(model):
        model.eval()
        model.train()
        model(torch.randn(4, 2))
        assert model.longest == 7 and not torch.equal(mean, torch.zeros(2))
    assert vars(model) == before and model.longest == 3
    assert model.frequency is frequency and frequency.tolist() == [1.0, 1.0]
    assert [*model._buffers] == ["frequency"]
    assert model.norm.running_mean is mean and mean.tolist() == [0.0, 0.0]
    assert model.norm.num_batches_tracked == 0


def test_a_batch_stays_as_it_is() -> None:
    given = batch(token_type_ids=None)
    held = dict(given)
    measured(tiny_model("llama"), given, include=NORM)
    assert given.keys() == held.keys() and all(given[name] is held[name] for name in held)
