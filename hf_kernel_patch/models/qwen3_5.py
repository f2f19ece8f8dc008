"""Qwen3.5, the text model: as Qwen3-Next, without experts."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3_5",
    {
        "Qwen3_5RMSNorm.forward": "rms_norm.gemma",
        "Qwen3_5RMSNormGated.forward": "rms_norm.gated",
        "apply_rotary_pos_emb": "rope.partial",
        "Qwen3_5MLP.forward": "swiglu.gate_up_down",
        "Qwen3_5ForCausalLM.forward": "causal_lm.dense",
    },
    transformers=">=5.2",
)
