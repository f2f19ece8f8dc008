"""Qwen3."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3",
    {
        "Qwen3RMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "Qwen3MLP.forward": "gated_product",
        "Qwen3Attention.forward": "qk_norm_rope",
        "Qwen3DecoderLayer.forward": "residual_norm",
        "Qwen3ForCausalLM.forward": "head_loss",
    },
)
