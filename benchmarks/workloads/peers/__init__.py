"""Who else computes the ops: transformers itself, PyTorch, Liger, cut cross-entropy, scattermoe.

A builder takes an op's arguments by name and gives a function with what to call it on, so that
modules hold the arguments' own leaves and torch.compile can wrap the function.
"""

from __future__ import annotations

import os

import torch
from torch.nn import functional as F

from benchmarks.workloads.peers import experts, losses, norms, rotary
from benchmarks.workloads.peers.builder import Builder, Built
from hf_kernel_patch.devices import missing_package

__all__ = ["COMPILED", "PACKAGES", "PEERS", "Builder", "Built", "absent"]

#: By op: the peers, the original of transformers first.
PEERS: dict[str, dict[str, Builder]] = {
    "rms_norm": {
        "eager": norms.eager_rms_norm,
        "torch": norms.torch_rms_norm,
        "liger": norms.liger_rms_norm,
    },
    "add_rms_norm": {
        "eager": norms.eager_add_rms_norm,
        "torch": norms.torch_add_rms_norm,
        "liger": norms.liger_add_rms_norm,
    },
    "rope": {"eager": rotary.eager_rope, "liger": rotary.liger_rope},
    "qk_norm_rope": {"eager": rotary.eager_qk_norm_rope, "liger": rotary.liger_qk_norm_rope},
    "swiglu": {"eager": experts.eager_swiglu, "liger": experts.liger_swiglu},
    "moe": {
        "eager": experts.experts("eager"),
        "torch": experts.torch_moe,
        "grouped_mm": experts.experts("grouped_mm"),
        "batched_mm": experts.experts("batched_mm"),
        "liger": experts.liger_moe,
        "scattermoe": experts.scattermoe,
    },
    "linear_cross_entropy": {
        "eager": losses.eager_loss,
        "torch": losses.torch_loss,
        "liger": losses.liger_loss,
        "cce": losses.cut_loss,
    },
}
#: What torch.compile is given: the original, except where that is a loop over the experts.
COMPILED = {"moe": "grouped_mm"}
#: The package that a peer comes from, and needs an accelerator for.
PACKAGES = {
    "liger": "liger_kernel",
    "cce": "cut_cross_entropy",
    "scattermoe": "scattermoe",
}


def absent(op: str, provider: str, device: str) -> str | None:
    """Why a peer cannot take part, or None."""
    if op == "linear_cross_entropy" and provider == "torch":
        found = hasattr(torch.nn, "LinearCrossEntropyOptions")
        return None if found else "this torch has no fused linear_cross_entropy"
    if op == "moe" and provider == "torch" and not hasattr(F, "grouped_mm"):
        return "this torch has no grouped_mm"
    if (package := PACKAGES.get(provider)) is not None:
        if missing_package(package):
            return f"{package} is not installed"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"{package} has no kernels for a CPU"
    return None
