"""A verification on an accelerator that has no float64: the truth is computed on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.kernels import register_kernel
from tests.support.tiny import tiny_model, tokens


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_its_own_kernels_are_no_further_from_the_truth(name: str) -> None:
    model: Any = tiny_model(name).to("npu", torch.bfloat16)
    before = torch.npu.get_rng_state()
    found = hf_kernel_patch.verify(model, {"input_ids": tokens(), "labels": tokens()}, models=name)
    assert found.ok and found.whole and found.device == "npu:0", str(found)
    served = {kernel for row in found.rows if row.measures for kernel in row.kernels}
    assert served >= {"npu_fused_rmsnorm", "npu_fused_rope"}
    assert torch.equal(torch.npu.get_rng_state(), before)


def test_a_wrong_one_is_named() -> None:
    right = registry.kernels()["npu_fused_swiglu"]

    def function(*arguments: Any) -> torch.Tensor:
        return right.load()(*arguments) * 1.05

    members = {"kernel_id": "wrong_npu_swiglu", "function": staticmethod(function)}
    register_kernel(type("Wrong", (right,), members))
    model: Any = tiny_model("llama").to("npu", torch.bfloat16)
    try:
        found = hf_kernel_patch.verify(
            model, {"input_ids": tokens()}, "wrong_npu_swiglu,npu_fused_rmsnorm", models="llama"
        )
    finally:
        del registry.kernels()["wrong_npu_swiglu"]
    assert found.sites == ("transformers.models.llama.modeling_llama.LlamaMLP.forward",)
