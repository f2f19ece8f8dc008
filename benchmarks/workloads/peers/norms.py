"""rms_norm and add_rms_norm by others."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from benchmarks.workloads.ops import Arguments
from benchmarks.workloads.peers.builder import Built


def eager_norm(weight: Any, eps: float) -> Any:
    """transformers' own RMSNorm over the given weight."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(len(weight), eps)
    module.weight = weight
    return module


def eager_rms_norm(a: Arguments) -> Built:
    return eager_norm(a.weight, a.eps), (a.x,)


def torch_rms_norm(a: Arguments) -> Built:
    return F.rms_norm, (a.x, a.weight.shape, a.weight, a.eps)


def liger_norm(weight: Any, eps: float) -> Any:
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    module = LigerRMSNorm(len(weight), eps)
    module.weight = weight
    return module


def liger_rms_norm(a: Arguments) -> Built:
    return liger_norm(a.weight, a.eps), (a.x,)


def eager_add_rms_norm(a: Arguments) -> Built:
    norm = eager_norm(a.weight, a.eps)

    def add_norm(x: Any, residual: Any) -> Any:
        total = residual + x
        return total, norm(total)

    return add_norm, (a.x, a.residual)


def torch_add_rms_norm(a: Arguments) -> Built:
    def add_norm(x: Any, residual: Any, weight: Any) -> Any:
        total = residual + x
        return total, F.rms_norm(total, weight.shape, weight, a.eps)

    return add_norm, (a.x, a.residual, a.weight)


def liger_add_rms_norm(a: Arguments) -> Built:
    from liger_kernel.transformers.fused_add_rms_norm import LigerFusedAddRMSNorm

    module = LigerFusedAddRMSNorm(len(a.weight), a.eps)
    module.weight = a.weight

    def add_norm(x: Any, residual: Any) -> Any:
        normed, total = module(x, residual)
        return total, normed

    return add_norm, (a.x, a.residual)
