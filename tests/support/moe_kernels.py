"""The kernels of moe that run wherever the tests do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hf_kernel_patch import registry
from hf_kernel_patch.kernels import register_kernel
from hf_kernel_patch.ops.moe import CudaFusedMoE

#: The Triton kernel runs under the interpreter, or on a GPU.
KERNELS = ["torch_fused_moe", "interpreted_moe"]


@contextmanager
def registered(kernel: str) -> Iterator[None]:
    """With the Triton kernel under a name of its own, for whatever device."""
    if kernel != "interpreted_moe":
        yield
        return
    pytest.importorskip("triton")
    members = {"kernel_id": kernel, "device": "any", "check_deps": classmethod(lambda cls: None)}
    register_kernel(type("Interpreted", (CudaFusedMoE,), members))
    try:
        yield
    finally:
        del registry.kernels()[kernel]
