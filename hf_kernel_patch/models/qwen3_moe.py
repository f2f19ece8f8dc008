"""Qwen3-MoE: stacked experts in transformers 5, a list of experts in 4."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3_moe",
    {
        "Qwen3MoeRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "Qwen3MoeMLP.forward": "gated_product",
        "Qwen3MoeExperts.forward": ("moe.stacked", ">=5"),
        "Qwen3MoeForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "Qwen3MoeSparseMoeBlock.forward": ("moe.list", "<5"),
        "Qwen3MoeAttention.forward": "qk_norm_rope",
        "Qwen3MoeDecoderLayer.forward": "residual_norm",
        "Qwen3MoeForCausalLM.forward": "head_loss",
    },
)
