"""A benchmark on an accelerator: memory of its allocator, its kernels, and models of full width."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch.benchmarking import memory
from hf_kernel_patch.cli import bench as command
from tests.support.tiny import tiny_model, tokens


def test_what_its_own_kernels_gain_and_the_memory_that_a_call_takes() -> None:
    model: Any = tiny_model("llama").to("npu", torch.bfloat16)
    ids = tokens().to("npu")
    before = torch.npu.get_rng_state()
    found = hf_kernel_patch.bench(
        model,
        {"input_ids": ids, "labels": ids},
        models="llama",
        decode=2,
        rounds=2,
        progress=str,
    )
    assert torch.equal(torch.npu.get_rng_state(), before)
    assert "bfloat16 on npu:0 (" in found.title and found.memory == "allocated"
    assert {"rms_norm", "rope", "swiglu"} <= {*found.ops}
    assert not any(row.failed for row in found.rows)
    weights = sum(one.numel() for one in model.parameters()) * 2
    peaks = {row.variant: row.peak for row in found.rows if row.workload == "training"}
    assert all(peak is not None and peak > 2 * weights for peak in peaks.values())
    assert memory.resets("npu:0") and memory.in_use("npu:0") == memory.in_use("npu")


def test_a_batch_from_the_cpu_is_taken_to_the_model() -> None:
    model: Any = tiny_model("llama").to("npu", torch.bfloat16)
    found = hf_kernel_patch.bench(
        model, {"input_ids": tokens()}, models="llama", ops=False, decode=1, rounds=1, progress=str
    )
    assert found.workloads == ("decoding",)


def test_what_does_not_fit_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama").to("npu", torch.bfloat16)
    ids = tokens().to("npu")
    full: list[int] = []

    def fill(x: torch.Tensor) -> torch.Tensor:
        large = torch.ones(2**20, device="npu")
        full.append(memory.in_use("npu"))
        raise torch.OutOfMemoryError(f"{len(large)} more do not fit")

    monkeypatch.setattr(torch, "rsqrt", fill)  # of transformers, and of the simulated device
    before = memory.in_use("npu")
    found = hf_kernel_patch.bench(
        model,
        {"input_ids": ids, "labels": ids},
        "rms_norm",
        models="llama",
        decode=0,
        rounds=1,
        progress=str,
    )
    assert {row.failed for row in found.rows} == {"out of memory"}
    assert min(full) >= before + 2**22 and memory.in_use("npu") == before


def test_a_model_type_has_the_widths_of_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(command, "load", lambda name, **options: told.update(options))
    _, note = command.build(command.Model("llama", None, "npu", None, None, None))
    assert told["tiny"] is False and told["layers"] == command.LAYERS
    assert "random weights: the widths of the config of llama, and 4 layers of it" in note
