"""Phi-3 and Phi-4: partial rotary, gate and up in one projection."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "phi3",
    {
        "Phi3RMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.partial",
        "Phi3MLP.forward": "gated_product",
        "Phi3DecoderLayer.forward": "residual_norm",
        "Phi3ForCausalLM.forward": "head_loss",
    },
)
