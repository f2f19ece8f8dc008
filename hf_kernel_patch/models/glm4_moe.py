"""GLM-4-MoE: DeepSeek-V3's experts, partial rotary."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "glm4_moe",
    {
        "Glm4MoeRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.partial",
        "Glm4MoeMLP.forward": "gated_product",
        "Glm4MoeExperts.forward": ("moe.stacked", ">=5.13"),
        "Glm4MoeNaiveMoe.forward": ("moe.stacked", ">=5,<5.13"),
        "Glm4MoeMoE.moe": ("moe.list_chosen", "<5"),
        "Glm4MoeForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "Glm4MoeDecoderLayer.forward": "residual_norm",
        "Glm4MoeForCausalLM.forward": "head_loss",
    },
)
