"""swiglu and moe by others."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.workloads.ops import Arguments
from benchmarks.workloads.peers.builder import Builder, Built

#: What batched_mm may copy of the experts' weights before it is left out.
LARGEST_COPY = 16 * 2**30


def eager_swiglu(a: Arguments) -> Built:
    from transformers.activations import ACT2FN

    act_fn = ACT2FN["silu"]
    return lambda gate, up: act_fn(gate) * up, (a.gate, a.up)


def liger_swiglu(a: Arguments) -> Built:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu, (a.gate, a.up)


def experts(implementation: str) -> Builder:
    """transformers' Qwen3-MoE experts, under one of its implementations."""

    def build(a: Arguments) -> Built:
        from transformers.models.qwen3_moe import modeling_qwen3_moe

        copied = a.index.numel() * a.gate_up[0].numel() * a.gate_up.element_size()
        if implementation == "batched_mm" and copied > LARGEST_COPY:
            raise MemoryError(f"batched_mm would copy {copied / 2**30:.0f} GiB of weights")
        config = _moe_config(a)
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = modeling_qwen3_moe.Qwen3MoeExperts(config)
        module.gate_up_proj, module.down_proj = a.gate_up, a.down
        return module, (a.hidden, a.index, a.weights)

    return build


def _moe_config(a: Arguments) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=a.hidden.shape[-1],
        moe_intermediate_size=a.down.shape[-1],
        num_experts=len(a.down),
        num_experts_per_tok=a.index.shape[-1],
    )


def liger_moe(a: Arguments) -> Built:
    from liger_kernel.transformers.swiglu import LigerExperts

    with torch.device("meta"):
        module = LigerExperts(_moe_config(a))
    module.gate_up_proj, module.down_proj = a.gate_up, a.down
    return module, (a.hidden, a.index, a.weights)


def scattermoe(a: Arguments) -> Built:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    experts, top = len(a.down), a.index.shape[-1]

    def moe(hidden: Any, index: Any, weights: Any, gate_up: Any, down: Any) -> Any:
        order = flatten_sort_count(index, experts)
        first, second = gate_up.permute(0, 2, 1), down.permute(0, 2, 1)
        gate, up = parallel_linear(hidden, first, top, *order, grouped_out=True).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        return parallel_linear(inner, second, 1, *order, grouped_in=True, gates=weights)

    return moe, (a.hidden, a.index, a.weights, a.gate_up, a.down)


def torch_moe(a: Arguments) -> Built:
    """torch's own grouped products, with as little around them as they need."""
    experts, top = len(a.down), a.index.shape[-1]

    def moe(hidden: Any, index: Any, weights: Any, gate_up: Any, down: Any) -> Any:
        chosen, order = index.flatten().sort()
        each = torch.arange(experts, device=index.device)
        ends = torch.searchsorted(chosen, each, right=True, out_int32=True)
        gate, up = F.grouped_mm(hidden[order // top], gate_up.mT, offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)[order.argsort()]
        return (rows.view(*index.shape, -1) * weights[..., None]).sum(1)

    return moe, (a.hidden, a.index, a.weights, a.gate_up, a.down)
