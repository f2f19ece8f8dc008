"""What the descriptors of the Triton kernels share; imports no backend."""

from __future__ import annotations

from typing import ClassVar

from hf_kernel_patch.kernels import BaseKernel


class TritonKernel(BaseKernel):
    """A kernel in Triton, the default where it runs: on CUDA devices that a probe succeeds on."""

    device = "cuda"
    backend = "triton"
    requires = ("torch", "triton")
    default_on: ClassVar[tuple[str, ...]] = ("cuda",)
    traceable = True

    @classmethod
    def check_deps(cls) -> str | None:
        why = super().check_deps()
        if why is None:
            from hf_kernel_patch.ops._shared.probe import probe

            why = probe(cls.device)
        return why
