"""Qwen3."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3",
    {
        "Qwen3RMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "Qwen3MLP.forward": "swiglu.gate_up_down",
        "Qwen3Attention.forward": "attention.qk_norm",
        "Qwen3DecoderLayer.forward": "decoder_layer.pre_norm",
        "Qwen3ForCausalLM.forward": "causal_lm.dense",
    },
)
