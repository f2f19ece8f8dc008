"""OLMo 2."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "olmo2",
    {
        "Olmo2RMSNorm.forward": "rms_norm.olmo2",
        "apply_rotary_pos_emb": "rope.cast",
        "Olmo2MLP.forward": "gated_product",
        "Olmo2ForCausalLM.forward": "head_loss",
    },
)
