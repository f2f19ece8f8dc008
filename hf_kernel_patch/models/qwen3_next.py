"""Qwen3-Next: linear attention with a gated norm, partial rotary, experts and a shared expert."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3_next",
    {
        "Qwen3NextRMSNorm.forward": "rms_norm.gemma",
        "Qwen3NextRMSNormGated.forward": "rms_norm.gated",
        "apply_rotary_pos_emb": "rope.partial",
        "Qwen3NextMLP.forward": "swiglu.gate_up_down",
        "Qwen3NextExperts.forward": ("moe.stacked", ">=5"),
        "Qwen3NextSparseMoeBlock.forward": ("moe.list_shared", "<5"),
        "Qwen3NextForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "Qwen3NextForCausalLM.forward": "causal_lm.moe",
    },
    transformers=">=4.57",
)
