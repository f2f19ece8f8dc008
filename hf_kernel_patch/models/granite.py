"""Granite."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "granite",
    {
        "GraniteRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "GraniteMLP.forward": "gated_product",
        "GraniteDecoderLayer.forward": "residual_norm",
        "GraniteForCausalLM.forward": "head_loss",
    },
)
