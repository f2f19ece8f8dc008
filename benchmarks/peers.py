"""Who else computes the ops: transformers itself, PyTorch, Liger, cut cross-entropy, scattermoe.

A builder takes an op's arguments by name and gives a function with what to call it on, so that
modules hold the arguments' own leaves and torch.compile can wrap the function.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F

from benchmarks.ops import Arguments
from hf_kernel_patch.devices import missing_package
from hf_kernel_patch.ops.linear_cross_entropy.reference import shifted

Built: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]
Builder: TypeAlias = Callable[[Arguments], Built]
#: What batched_mm may copy of the experts' weights before it is left out.
LARGEST_COPY = 16 * 2**30


def _norm(weight: Any, eps: float) -> Any:
    """transformers' own RMSNorm over the given weight."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(len(weight), eps)
    module.weight = weight
    return module


def _eager_rms_norm(a: Arguments) -> Built:
    return _norm(a.weight, a.eps), (a.x,)


def _torch_rms_norm(a: Arguments) -> Built:
    return F.rms_norm, (a.x, a.weight.shape, a.weight, a.eps)


def _liger_norm(weight: Any, eps: float) -> Any:
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    module = LigerRMSNorm(len(weight), eps)
    module.weight = weight
    return module


def _liger_rms_norm(a: Arguments) -> Built:
    return _liger_norm(a.weight, a.eps), (a.x,)


def _eager_add_rms_norm(a: Arguments) -> Built:
    norm = _norm(a.weight, a.eps)

    def add_norm(x: Any, residual: Any) -> Any:
        total = residual + x
        return total, norm(total)

    return add_norm, (a.x, a.residual)


def _torch_add_rms_norm(a: Arguments) -> Built:
    def add_norm(x: Any, residual: Any, weight: Any) -> Any:
        total = residual + x
        return total, F.rms_norm(total, weight.shape, weight, a.eps)

    return add_norm, (a.x, a.residual, a.weight)


def _liger_add_rms_norm(a: Arguments) -> Built:
    from liger_kernel.transformers.fused_add_rms_norm import LigerFusedAddRMSNorm

    module = LigerFusedAddRMSNorm(len(a.weight), a.eps)
    module.weight = a.weight

    def add_norm(x: Any, residual: Any) -> Any:
        normed, total = module(x, residual)
        return total, normed

    return add_norm, (a.x, a.residual)


#: The op's ``pairs`` -> the family whose rotary function has them, and its name there.
ROTARY = {
    "halves": ("llama", "apply_rotary_pos_emb"),
    "interleaved": ("glm", "apply_rotary_pos_emb"),
    "interleaved_to_halves": ("deepseek_v3", "apply_rotary_pos_emb_interleave"),
}


def _eager_rope(a: Arguments) -> Built:
    family, name = ROTARY[getattr(a, "pairs", "halves")]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")

    # Looked up at each call, as attention does, so that a patch of it takes effect.
    def rope(*tensors: Any) -> Any:
        return getattr(module, name)(*tensors)

    return rope, (a.q, a.k, a.cos, a.sin)


def _liger_rope(a: Arguments) -> Built:
    if hasattr(a, "pairs"):
        raise ValueError("it rotates halves")
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    return liger_rotary_pos_emb, (a.q, a.k, a.cos, a.sin)


def _norms_and_rope(q_norm: Any, k_norm: Any, rope: Any, a: Arguments) -> Built:
    """As Qwen3's attention: norm over (B, S, heads, D), transpose, rotate."""

    def both(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return rope(q_norm(q).transpose(1, 2), k_norm(k).transpose(1, 2), cos, sin)

    return both, (a.q, a.k, a.cos, a.sin)


def _eager_qk_norm_rope(a: Arguments) -> Built:
    rope, _ = _eager_rope(a)
    return _norms_and_rope(_norm(a.q_weight, a.eps), _norm(a.k_weight, a.eps), rope, a)


def _liger_qk_norm_rope(a: Arguments) -> Built:
    rope, _ = _liger_rope(a)
    return _norms_and_rope(_liger_norm(a.q_weight, a.eps), _liger_norm(a.k_weight, a.eps), rope, a)


def _eager_swiglu(a: Arguments) -> Built:
    from transformers.activations import ACT2FN

    act_fn = ACT2FN["silu"]
    return lambda gate, up: act_fn(gate) * up, (a.gate, a.up)


def _liger_swiglu(a: Arguments) -> Built:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu, (a.gate, a.up)


def _experts(implementation: str) -> Builder:
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


def _liger_moe(a: Arguments) -> Built:
    from liger_kernel.transformers.swiglu import LigerExperts

    with torch.device("meta"):
        module = LigerExperts(_moe_config(a))
    module.gate_up_proj, module.down_proj = a.gate_up, a.down
    return module, (a.hidden, a.index, a.weights)


def _scattermoe(a: Arguments) -> Built:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    experts, top = len(a.down), a.index.shape[-1]

    def moe(hidden: Any, index: Any, weights: Any, gate_up: Any, down: Any) -> Any:
        order = flatten_sort_count(index, experts)
        first, second = gate_up.permute(0, 2, 1), down.permute(0, 2, 1)
        gate, up = parallel_linear(hidden, first, top, *order, grouped_out=True).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        return parallel_linear(inner, second, 1, *order, grouped_in=True, gates=weights)

    return moe, (a.hidden, a.index, a.weights, a.gate_up, a.down)


def _torch_moe(a: Arguments) -> Built:
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


def _eager_loss(a: Arguments) -> Built:
    from transformers.loss.loss_utils import ForCausalLMLoss

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        return ForCausalLMLoss(F.linear(hidden, weight), labels, len(weight))

    return loss, (a.hidden, a.weight, a.labels)


def _torch_loss(a: Arguments) -> Built:
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        targets = shifted(labels, None, -100)
        total = F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets, reduction="sum", options=options
        )
        return total / (targets != -100).sum()

    return loss, (a.hidden, a.weight, a.labels)


def _liger_loss(a: Arguments) -> Built:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        targets = shifted(labels, None, -100)
        return liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, targets)

    return loss, (a.hidden, a.weight, a.labels)


def _cut_loss(a: Arguments) -> Built:
    from cut_cross_entropy import linear_cross_entropy

    return lambda *tensors: linear_cross_entropy(*tensors, shift=True), (
        a.hidden,
        a.weight,
        a.labels,
    )


#: By op: the peers, the original of transformers first.
PEERS: dict[str, dict[str, Builder]] = {
    "rms_norm": {"eager": _eager_rms_norm, "torch": _torch_rms_norm, "liger": _liger_rms_norm},
    "add_rms_norm": {
        "eager": _eager_add_rms_norm,
        "torch": _torch_add_rms_norm,
        "liger": _liger_add_rms_norm,
    },
    "rope": {"eager": _eager_rope, "liger": _liger_rope},
    "qk_norm_rope": {"eager": _eager_qk_norm_rope, "liger": _liger_qk_norm_rope},
    "swiglu": {"eager": _eager_swiglu, "liger": _liger_swiglu},
    "moe": {
        "eager": _experts("eager"),
        "torch": _torch_moe,
        "grouped_mm": _experts("grouped_mm"),
        "batched_mm": _experts("batched_mm"),
        "liger": _liger_moe,
        "scattermoe": _scattermoe,
    },
    "linear_cross_entropy": {
        "eager": _eager_loss,
        "torch": _torch_loss,
        "liger": _liger_loss,
        "cce": _cut_loss,
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
