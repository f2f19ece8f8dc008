"""Qwen2 and Qwen2.5."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen2",
    {
        "Qwen2RMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "Qwen2MLP.forward": "gated_product",
        "Qwen2DecoderLayer.forward": "residual_norm",
        "Qwen2ForCausalLM.forward": "head_loss",
    },
)
