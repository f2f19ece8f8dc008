"""Which experts the user has asked for: what transformers keeps of it, and what the report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import hf_kernel_patch
from hf_kernel_patch.recognition.leaves.experts import TAKEN
from tests.support.tiny import TRANSFORMERS_5, tiny_model, tokens

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no choice of experts"),
]


def state(model: Any) -> dict[str, Any]:
    """All that a model and its parts, configs included, have as attributes."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = type(module), sorted(vars(module))
        if (config := vars(module).get("config")) is not None:
            found[f"{name} config"] = [(key, repr(value)) for key, value in vars(config).items()]
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    return tmp_path


def test_the_default_leaves_no_trace_of_having_been_asked_for(checkpoint: Path) -> None:
    """Or else "auto" had to respect it; see the README."""
    load = AutoModelForCausalLM.from_pretrained
    default = load(checkpoint)
    loaded = load(checkpoint, experts_implementation="grouped_mm")
    later, back = load(checkpoint), load(checkpoint)
    back.set_experts_implementation("eager")
    assert state(back) != state(default)
    for model in (later, back):
        model.set_experts_implementation("grouped_mm")
    for model in (loaded, later, back):
        assert state(model) == state(default)


@pytest.mark.parametrize("asked", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("when", ["loaded", "later", "patched"])
def test_what_was_asked_for_runs_where_it_can_be_seen(asked: str, when: str) -> None:
    model = tiny_model(
        "qwen3_moe", **({"experts_implementation": asked} if when == "loaded" else {})
    )
    if when == "later":
        model.set_experts_implementation(asked)
    hf_kernel_patch.apply_default_kernels(model)
    if when == "patched":
        model.set_experts_implementation(asked)
    model(tokens())
    (row,) = [r for r in hf_kernel_patch.status() if r.site.endswith("Qwen3MoeExperts.forward")]
    reason = f"experts_implementation={asked!r} was asked for"
    if asked == "grouped_mm" or when == "patched":
        assert row.reason == TAKEN
    else:
        assert row.reason == reason
    assert (row.served, row.fallbacks) == ((2, {}) if asked == "grouped_mm" else (0, {reason: 2}))
    hf_kernel_patch.unpatch(model)
