"""Mixtral."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "mixtral",
    {
        "MixtralRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "MixtralExperts.forward": ("moe.stacked", ">=5"),
        "MixtralForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "MixtralSparseMoeBlock.forward": ("moe.list_jitter", "<5"),
        "MixtralBlockSparseTop2MLP.forward": ("gated_product", "<5"),
        "MixtralDecoderLayer.forward": "residual_norm",
        "MixtralForCausalLM.forward": "head_loss",
    },
)
