"""Granite."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "granite",
    {
        "GraniteRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "GraniteMLP.forward": "swiglu.gate_up_down",
        "GraniteDecoderLayer.forward": ("decoder_layer.scaled", ">=5"),
        "GraniteForCausalLM.forward": "causal_lm.scaled",
    },
)
