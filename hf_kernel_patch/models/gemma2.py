"""Gemma 2."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "gemma2",
    {
        "Gemma2RMSNorm.forward": "rms_norm.gemma",
        "apply_rotary_pos_emb": "rope.full",
        "Gemma2MLP.forward": "gated_product",
        "Gemma2DecoderLayer.forward": "residual_norm",
        "Gemma2ForCausalLM.forward": "head_loss",
    },
)
