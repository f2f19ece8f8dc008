"""Mistral."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "mistral",
    {
        "MistralRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "MistralMLP.forward": "swiglu.gate_up_down",
        "MistralDecoderLayer.forward": "decoder_layer.pre_norm",
        "MistralForCausalLM.forward": "causal_lm.dense",
    },
)
