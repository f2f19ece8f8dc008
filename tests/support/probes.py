"""What the tests of the global patch share: places to look at, and a kernel that can be watched."""

# Imports no torch at once: some of the tests that need this run without it.

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.kernels import BaseKernel, register_kernel
from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching.report import PatchReport

if TYPE_CHECKING:
    import torch

NORM, ROPE = "torch_fused_rmsnorm", "torch_fused_rope"
SWIGLU, MOE = "torch_fused_swiglu", "torch_fused_moe"
LAYERS = (NORM, ROPE, SWIGLU)


def llama() -> Any:
    """Llama's modelling module."""
    from transformers.models.llama import modeling_llama

    return modeling_llama


def places() -> dict[str, Any]:
    """Every class and function that a table names in an imported modelling module, as it is now."""
    found: dict[str, Any] = {}
    for architecture in architectures().values():
        module = sys.modules.get(architecture.module)
        for spec in architecture.sites if module else ():
            name, _, attribute = spec.qualname.partition(".")
            owner = getattr(module, name, None)
            if owner is not None:
                found[spec.name] = vars(owner).get(attribute) if attribute else owner
    return found


def changed(before: dict[str, Any]) -> set[str]:
    """The last part of every place that is not the object it was, such as "LlamaMLP.forward"."""
    now = places()
    return {
        site.partition(".modeling_")[2].partition(".")[2]
        for site in before
        if now[site] is not before[site]
    }


def logits(model: Any, **options: Any) -> torch.Tensor:
    """The model's logits for ``tokens()``, without gradients."""
    import torch

    from tests.support.tiny import tokens

    with torch.no_grad():
        return model(tokens(), **options).logits


def fallbacks(report: PatchReport) -> Counter[str]:
    """Reason -> calls that the original took, over all rows of the report."""
    total: Counter[str] = Counter()
    for row in report:
        total.update(row.fallbacks)
    return total


def served(report: PatchReport) -> int:
    """Calls that kernels served, over all rows of the report."""
    return sum(row.served for row in report)


def owned(model: Any) -> dict[tuple[str, str], Any]:
    """(module, attribute) -> every forward that an instance owns."""
    return {
        (name, attribute): vars(module)[attribute]
        for name, module in model.named_modules()
        for attribute in ("forward", "_old_forward")
        if attribute in vars(module)
    }


def same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether both hold the very same objects."""
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)


class Watched:
    """A kernel for RMSNorm of a user's own: ``kernel_id``, and ``calls`` that it has served."""

    def __init__(self, kernel_id: str):
        self.kernel_id = kernel_id
        self.calls = 0

    def __call__(self, *arguments: Any) -> torch.Tensor:
        from hf_kernel_patch.ops.rms_norm.torch import rms_norm

        self.calls += 1
        return rms_norm(*arguments)


@contextmanager
def watched_kernel(kernel_id: str = "own_rmsnorm", **members: Any) -> Iterator[Watched]:
    """Registers a ``Watched`` for the block."""
    watched = Watched(kernel_id)
    members = {"kernel_id": kernel_id, "op": "rms_norm", "function": watched, **members}
    register_kernel(type("Own", (BaseKernel,), members))
    try:
        yield watched
    finally:
        del registry.kernels()[kernel_id]


def run_python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python of its own, with no variable of ours set but these."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_KERNEL_PATCH")}
    root = Path(hf_kernel_patch.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
