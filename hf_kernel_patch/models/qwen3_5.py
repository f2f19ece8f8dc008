"""Qwen3.5, the text model: as Qwen3-Next, without experts."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3_5",
    {
        "Qwen3_5RMSNorm.forward": "rms_norm.gemma",
        "Qwen3_5RMSNormGated.forward": "rms_norm.gated",
        "apply_rotary_pos_emb": "rope.partial",
        "apply_rotary_pos_emb_vision": "rope.vision",
        "Qwen3_5MLP.forward": "gated_product",
        "Qwen3_5Attention.forward": "qk_norm_rope",
        "Qwen3_5DecoderLayer.forward": "residual_norm",
        "Qwen3_5ForCausalLM.forward": "head_loss",
        "Qwen3_5ForConditionalGeneration.forward": "head_loss",
    },
    transformers=">=5.2",
)
