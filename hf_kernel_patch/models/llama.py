"""Llama 2, 3 and the many models of that shape."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "llama",
    {
        "LlamaRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "LlamaMLP.forward": "gated_product",
        "LlamaDecoderLayer.forward": "residual_norm",
        "LlamaForCausalLM.forward": "head_loss",
    },
)
