"""moe with a gate of the experts' own, against GPT-OSS's experts and others of transformers 5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_kernel_patch.ops.moe import CudaFusedMoE, NpuFusedMoE, TorchFusedMoE, reference
from hf_kernel_patch.ops.moe.reference import Gating
from tests.support.ops.cases_moe import EVEN, KNOWS_SENTINEL
from tests.support.ops.cases_moe_gated import (
    CASES,
    PLAIN,
    case,
    gpt_oss_experts,
    named,
)
from tests.support.ops.checks import (
    Case,
    check_backend,
    check_double_backward,
    check_reference,
    check_saves_nothing,
)
from tests.support.tiny import ARCHITECTURES, TRANSFORMERS_5, error

pytestmark = pytest.mark.skipif(
    not TRANSFORMERS_5 or "gpt_oss" not in ARCHITECTURES, reason="has no stacked experts of GPT-OSS"
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_what_hugging_face_computes(case: Case) -> None:
    check_reference(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_further_from_the_truth_than_hugging_face(case: Case) -> None:
    check_backend(TorchFusedMoE, case)


@pytest.mark.parametrize("check", [check_double_backward, check_saves_nothing])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_autograd_holds(check: Any, case: Case) -> None:
    check(TorchFusedMoE, case)


def test_a_gate_with_parameters_and_a_norm_after_it_train() -> None:
    (hidden, index, weights, gate_up, down, _), _ = case("many tokens", biased=False).inputs("cpu")
    torch.manual_seed(0)
    gate, norm = nn.Linear(2 * EVEN[1], EVEN[1]), nn.LayerNorm(EVEN[0])
    leaves = [hidden, weights, gate_up, down, *gate.parameters(), *norm.parameters()]

    def results(function: Any) -> list[torch.Tensor]:
        out = function(hidden, index, weights, gate_up, down, Gating(gate, after=norm))
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    ours, theirs = (results(one) for one in (TorchFusedMoE.load(), reference.moe))
    assert max(error(one, other) for one, other in zip(ours, theirs, strict=True)) < 1e-6


def test_experts_of_other_ranks_are_skipped_as_transformers_does() -> None:
    if not KNOWS_SENTINEL:
        pytest.skip("transformers' grouped products know no other ranks")
    from transformers.integrations.moe import grouped_mm_experts_forward

    biased = case("experts of another rank")
    (hidden, index, weights, gate_up, down, gating), _ = biased.inputs("cpu")
    experts = gpt_oss_experts(*EVEN)
    experts._is_expert_parallel = True
    experts.load_state_dict(named(gate_up, down, gating))
    found = TorchFusedMoE.load()(hidden, index, weights, gate_up, down, gating)
    assert error(found.detach(), grouped_mm_experts_forward(experts, hidden, index, weights)) < 1e-6


@pytest.mark.parametrize("kernel", [CudaFusedMoE, NpuFusedMoE])
def test_other_kernels_leave_it(kernel: Any) -> None:
    for one in PLAIN:
        assert "no gate of the experts' own" in str(kernel.why_fallback(*one.inputs("cpu")[0]))


def test_a_bias_of_another_dtype_is_refused() -> None:
    *routed, gating = case("several experts").inputs("cpu")[0]
    assert TorchFusedMoE.why_fallback(*routed, gating) is None
    for name in ("gate_up_bias", "down_bias"):
        other = gating._replace(**{name: getattr(gating, name).half()})
        assert "differ in dtype" in str(TorchFusedMoE.why_fallback(*routed, other))
