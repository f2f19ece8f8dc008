"""Decoding from graphs, in layers that are written in other orders than Llama's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.models import architectures
from hf_kernel_patch.ops.add_rms_norm import TorchFusedAddRMSNorm
from hf_kernel_patch.recognition.outcome import How
from hf_kernel_patch.recognition.rules.decoding import layers as decoding
from tests.recognition.rules.layer_families import FAMILIES, HERE, model_of, table_of
from tests.recognition.rules.plain_graphs import Graphs
from tests.support.tiny import tokens

KERNEL, HEADS = "captured_add_rmsnorm", "torch_fused_qk_norm_rope"
#: Layers that are called as they are: their attention stands under a condition, or they are none.
UNCAPTURED = {"lfm2": "called inside of other code", "lfm2_moe": "other code", "axk1": ""}
#: What keeps whether norms were asked for may hinder the cut, which then says so.
EITHER = {"glm4_moe"}


def generated(model: Any, ids: torch.Tensor) -> Any:
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_hidden_states": True}
    return model.generate(ids, **options)


@pytest.mark.parametrize("name", [name for name in HERE if FAMILIES[name][2]])
def test_the_same_bits_with_graphs_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = type("Captured", (TorchFusedAddRMSNorm,), {"kernel_id": KERNEL, "device": "cpu"})
    graphs = Graphs()
    monkeypatch.setitem(decoding.GRAPHS, "cpu", lambda: graphs)
    monkeypatch.setitem(registry.kernels(), KERNEL, kernel)
    monkeypatch.setitem(architectures(), name, table_of(name))
    model = model_of(name).eval()
    eager = [generated(model, tokens(batch, 9)) for batch in (1, 3, 1)]
    with hf_kernel_patch.patched((KERNEL, HEADS), models=name) as report:
        found = [generated(model, tokens(batch, 9)) for batch in (1, 3, 1)]
        calls = {str(k) for row in report if row.op == "add_rms_norm" for k in row.calls}
    for ours, theirs in zip(found, eager):
        assert torch.equal(ours.sequences, theirs.sequences)
        for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            assert all(map(torch.equal, one, other))
    without = "".join(call for call in calls if "without CUDA graphs" in call)
    assert UNCAPTURED.get(name, "") in without
    if name not in EITHER:
        assert (How.REPLAYED in calls) == (name not in UNCAPTURED), calls
        assert bool(without) == bool(UNCAPTURED.get(name)), calls
    else:
        assert (How.REPLAYED in calls) != bool(without), calls
