"""Qwen3-VL-MoE: the text model; its experts are stacked the other way round in transformers 4."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3_vl_moe",
    {
        "Qwen3VLMoeTextRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "apply_rotary_pos_emb_vision": "rope.vision",
        "Qwen3VLMoeTextMLP.forward": "gated_product",
        "Qwen3VLMoeTextExperts.forward": ("moe.stacked", ">=5"),
        "Qwen3VLMoeForConditionalGeneration._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "Qwen3VLMoeTextAttention.forward": "qk_norm_rope",
        "Qwen3VLMoeTextDecoderLayer.forward": "residual_norm",
        "Qwen3VLMoeForConditionalGeneration.forward": "head_loss",
    },
)
