"""A run of the demo on an accelerator: what a CPU does not go through."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_kernel_patch.benchmarking import memory
from hf_kernel_patch.cli import demo
from hf_kernel_patch.cli.demo import models, worker
from tests.cli.short_demo import PLAN


def test_a_patched_run_trains_decodes_and_measures_the_device_s_memory() -> None:
    plan = replace(PLAN, device="npu", dtype=demo.DTYPES["npu"])
    eager = worker.Run(plan)
    expected = [eager.step()[0] for _ in range(2)]
    text, _ = eager.decode()
    include, words = demo.choose("llama", "npu")
    assert include == "auto" and "npu_fused_rmsnorm" in words
    patched = worker.Run(replace(plan, include=include))
    first, second = (patched.step()[0] for _ in range(2))
    assert [first, second] == pytest.approx(expected, abs=0.05)
    assert patched.peak() > 2 * patched.parameters * 2  # weights and gradients in bfloat16
    assert len(patched.decode()[0]) == len(text) == worker.NEW
    assert all(row.served for row in patched.report())
    assert memory.resets("npu")
    held = memory.in_use("npu")
    fused = patched.loss_memory()
    assert memory.in_use("npu") == held
    logits = plan.size.loss_tokens * models.REAL_VOCABULARY * 2
    assert fused is not None and logits < fused < 20 * logits
    assert all(patched.end().values())
    assert demo._gpu("npu")
