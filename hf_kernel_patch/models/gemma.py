"""Gemma: the norm's weight is stored less one, the gate is gelu-tanh."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "gemma",
    {
        "GemmaRMSNorm.forward": "rms_norm.gemma",
        "apply_rotary_pos_emb": "rope.full",
        "GemmaMLP.forward": "gated_product",
        "GemmaDecoderLayer.forward": "residual_norm",
        "GemmaForCausalLM.forward": "head_loss",
    },
)
