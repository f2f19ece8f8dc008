"""DeepSeek-V3: experts chosen in groups, and shared ones."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "deepseek_v3",
    {
        "DeepseekV3RMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "apply_rotary_pos_emb_interleave": "rope.deepseek",
        "DeepseekV3MLP.forward": "gated_product",
        "DeepseekV3Experts.forward": ("moe.stacked", ">=5.13"),
        "DeepseekV3NaiveMoe.forward": ("moe.stacked", ">=5,<5.13"),
        "DeepseekV3MoE.moe": ("moe.list_chosen", "<5"),
        "DeepseekV3ForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "DeepseekV3DecoderLayer.forward": "residual_norm",
        "DeepseekV3ForCausalLM.forward": "head_loss",
    },
)
