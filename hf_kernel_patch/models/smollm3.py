"""SmolLM3."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "smollm3",
    {
        "SmolLM3RMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "SmolLM3MLP.forward": "gated_product",
        "SmolLM3DecoderLayer.forward": "residual_norm",
        "SmolLM3ForCausalLM.forward": "head_loss",
    },
)
