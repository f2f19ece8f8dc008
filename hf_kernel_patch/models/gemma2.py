"""Gemma 2."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "gemma2",
    {
        "Gemma2RMSNorm.forward": "rms_norm.gemma",
        "apply_rotary_pos_emb": "rope.full",
        "Gemma2MLP.forward": "swiglu.gate_up_down",
        "Gemma2DecoderLayer.forward": ("decoder_layer.four_norms", ">=5"),
        "Gemma2ForCausalLM.forward": "causal_lm.softcap",
    },
)
