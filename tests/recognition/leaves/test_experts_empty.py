"""Experts without a token: what the original gives, its gradients, and whether there are any."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kernel_patch
from tests.support.moe_kernels import KERNELS, registered
from tests.support.tiny import TRANSFORMERS_5, modelling, tiny_config, tiny_model


def outcome(function: Any, hidden: torch.Tensor, leaves: list[torch.Tensor]) -> list[Any]:
    """Shape and dtype of the output, whether it needs a gradient, and what backward gives."""
    out = function(hidden)
    out = out[0] if isinstance(out, tuple) else out
    found: list[Any] = [out.shape, out.dtype, out.requires_grad]
    if out.requires_grad:
        grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        found += [None if one is None else one.count_nonzero().item() for one in grads]
    return found


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no stacked experts")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_stacked_experts_without_a_token(kernel: str, implementation: str, frozen: bool) -> None:
    config = tiny_config("qwen3_moe")
    config._experts_implementation = implementation
    experts = modelling("qwen3_moe").Qwen3MoeExperts(config).requires_grad_(not frozen)
    hidden = torch.randn(0, config.hidden_size, requires_grad=True)
    index, weights = torch.zeros(0, 2, dtype=torch.long), torch.rand(0, 2, requires_grad=True)
    leaves = [hidden, weights, *(p for p in experts.parameters() if p.requires_grad)]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return experts(hidden, index, weights)

    eager = outcome(run, hidden, leaves)
    assert eager[2] == (implementation != "eager")
    with registered(kernel), hf_kernel_patch.patched(kernel, models="qwen3_moe") as report:
        assert outcome(run, hidden, leaves) == eager
    (row,) = [row for row in report if row.site.endswith("Experts.forward")]
    assert row.fallbacks == {"there is no token": 1}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "qwen2_moe"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_block_without_a_token(kernel: str, name: str) -> None:
    layer = tiny_model(name).model.layers[-1]
    block = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
    hidden = torch.randn(1, 0, 64, requires_grad=True)
    leaves = [hidden, *block.parameters()]
    eager = outcome(block, hidden, leaves)
    with registered(kernel), hf_kernel_patch.patched(kernel, models=name) as report:
        assert outcome(block, hidden, leaves) == eager
    assert {"there is no token": 1} in [row.fallbacks for row in report]
