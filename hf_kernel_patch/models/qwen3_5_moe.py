"""Qwen3.5-MoE, the text model."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3_5_moe",
    {
        "Qwen3_5MoeRMSNorm.forward": "rms_norm.gemma",
        "Qwen3_5MoeRMSNormGated.forward": "rms_norm.gated",
        "apply_rotary_pos_emb": "rope.partial",
        "Qwen3_5MoeMLP.forward": "swiglu.gate_up_down",
        "Qwen3_5MoeExperts.forward": "moe.stacked",
        "Qwen3_5MoeForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "Qwen3_5MoeForCausalLM.forward": "causal_lm.moe",
    },
    transformers=">=5.2",
)
