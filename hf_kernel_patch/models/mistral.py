"""Mistral."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "mistral",
    {
        "MistralRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "MistralMLP.forward": "gated_product",
        "MistralDecoderLayer.forward": "residual_norm",
        "MistralForCausalLM.forward": "head_loss",
    },
)
