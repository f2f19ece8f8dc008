"""Qwen2-MoE: experts and a shared expert."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen2_moe",
    {
        "Qwen2MoeRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "Qwen2MoeMLP.forward": "gated_product",
        "Qwen2MoeExperts.forward": ("moe.stacked", ">=5"),
        "Qwen2MoeForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "Qwen2MoeSparseMoeBlock.forward": ("moe.list_shared", "<5"),
        "Qwen2MoeDecoderLayer.forward": "residual_norm",
        "Qwen2MoeForCausalLM.forward": "head_loss",
    },
)
