"""Qwen3-Next: linear attention with a gated norm, partial rotary, experts and a shared expert."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3_next",
    {
        "Qwen3NextRMSNorm.forward": "rms_norm.gemma",
        "Qwen3NextRMSNormGated.forward": "rms_norm.gated",
        "apply_rotary_pos_emb": "rope.partial",
        "Qwen3NextMLP.forward": "gated_product",
        "Qwen3NextExperts.forward": ("moe.stacked", ">=5"),
        "Qwen3NextSparseMoeBlock.forward": ("moe.list_shared", "<5"),
        "Qwen3NextForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "Qwen3NextAttention.forward": "qk_norm_rope",
        "Qwen3NextDecoderLayer.forward": "residual_norm",
        "Qwen3NextForCausalLM.forward": "head_loss",
    },
    transformers=">=4.57",
)
