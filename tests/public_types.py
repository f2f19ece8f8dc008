"""What type checkers have to say of the public functions; mypy reads it, nobody runs it.

Each ``type: ignore`` stands for an error that has to be there: mypy complains of one too many.
"""

from __future__ import annotations

from typing import assert_type

from transformers import LlamaForCausalLM

import hf_kernel_patch
from hf_kernel_patch import (
    BaseKernel,
    Benchmark,
    Bisection,
    KernelPatchCallback,
    PatchReport,
    Verification,
)


class OwnKernel(BaseKernel):
    kernel_id = "own"

    @classmethod
    def why_fallback(cls, *arguments: object) -> str | None:
        return "never"


def right(model: LlamaForCausalLM) -> None:
    assert_type(hf_kernel_patch.patch_transformers("auto"), PatchReport)
    hf_kernel_patch.patch_transformers(["rope"], models="llama", options={"moe": {"x": 1}})
    hf_kernel_patch.patch_transformers(None, config="training.yaml")
    assert_type(hf_kernel_patch.apply_kernel("own", model=model), LlamaForCausalLM)
    assert_type(hf_kernel_patch.apply_default_kernels(model), LlamaForCausalLM)
    hf_kernel_patch.apply_default_kernels(model, exclude=["rope", "*.LlamaMLP.forward"])
    assert_type(OwnKernel.apply(model=model), LlamaForCausalLM)
    KernelPatchCallback(include="auto", exclude="*.LlamaMLP.forward", report=True)
    assert_type(hf_kernel_patch.bisect(lambda: True, "rope"), Bisection)
    assert_type(hf_kernel_patch.verify(model, {"labels": 1}, factor=2), Verification)
    assert_type(hf_kernel_patch.bench(model, {}, "rope", decode=0), Benchmark)
    with hf_kernel_patch.patched(True) as report:
        assert_type(report, PatchReport)


def wrong(model: LlamaForCausalLM) -> None:
    print(hf_kernel_patch.nonsense)  # type: ignore[attr-defined]
    hf_kernel_patch.patch_transformers(5.5)  # type: ignore[arg-type]
    hf_kernel_patch.patch_transformers(strict=5)  # type: ignore[arg-type]
    hf_kernel_patch.apply_kernel(5, model=model)  # type: ignore[arg-type]
    hf_kernel_patch.apply_kernel("own")  # type: ignore[call-arg]
    KernelPatchCallback(includes="auto")  # type: ignore[call-arg]
    hf_kernel_patch.verify(model)  # type: ignore[call-arg]
    hf_kernel_patch.bisect("python train.py")  # type: ignore[arg-type]
