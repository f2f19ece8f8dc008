"""Qwen3.5-MoE, the text model."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3_5_moe",
    {
        "Qwen3_5MoeRMSNorm.forward": "rms_norm.gemma",
        "Qwen3_5MoeRMSNormGated.forward": "rms_norm.gated",
        "apply_rotary_pos_emb": "rope.partial",
        "apply_rotary_pos_emb_vision": "rope.vision",
        "Qwen3_5MoeMLP.forward": "gated_product",
        "Qwen3_5MoeExperts.forward": "moe.stacked",
        "Qwen3_5MoeForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "Qwen3_5MoeForConditionalGeneration._optimize_model_for_decode": "moe.decoding",
        "Qwen3_5MoeAttention.forward": "qk_norm_rope",
        "Qwen3_5MoeDecoderLayer.forward": "residual_norm",
        "Qwen3_5MoeForCausalLM.forward": "head_loss",
        "Qwen3_5MoeForConditionalGeneration.forward": "head_loss",
    },
    transformers=">=5.2",
)
