"""Our kernels, as the registry has them: what is registered later takes part by itself."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.workloads.ops import Arguments
from benchmarks.workloads.peers import Builder, Built
from hf_kernel_patch import registry
from hf_kernel_patch.kernels import Kernel

#: Kernels that are measured in another setting too: id -> name -> options.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "cuda_fused_linear_cross_entropy": {"exact": {"exact": True}},
}


def kernels(op: str, device: str) -> tuple[dict[str, Builder], dict[str, str]]:
    """Builders by kernel id, and the reasons of the kernels that cannot run here."""
    found: dict[str, Builder] = {}
    absent: dict[str, str] = {}
    for kernel_id, kernel in registry.kernels().items():
        if kernel.op == op:
            if why := why_not(kernel, device):
                absent[kernel_id] = why
            else:
                found[kernel_id] = _builder(kernel)
                for name, options in OPTIONS.get(kernel_id, {}).items():
                    found[f"{kernel_id}, {name}"] = _builder(kernel, **options)
    return found, absent


def why_not(kernel: Kernel, device: str) -> str | None:
    """Why a kernel cannot run on this device, or None."""
    if kernel.device not in ("any", device):
        return f"it is for {kernel.device}"
    return registry.unavailable(kernel)


def _builder(kernel: Kernel, **options: Any) -> Builder:
    def build(a: Arguments) -> Built:
        if why := kernel.why_fallback(*vars(a).values()):
            raise NotImplementedError(f"the kernel refuses this call: {why}")
        function = partial(kernel.load(), **options) if options else kernel.load()
        return function, tuple(vars(a).values())

    return build
