"""Qwen2 and Qwen2.5."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen2",
    {
        "Qwen2RMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "Qwen2MLP.forward": "swiglu.gate_up_down",
        "Qwen2DecoderLayer.forward": "decoder_layer.pre_norm",
        "Qwen2ForCausalLM.forward": "causal_lm.dense",
    },
)
