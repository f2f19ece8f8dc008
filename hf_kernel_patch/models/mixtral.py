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
        "MixtralBlockSparseTop2MLP.forward": ("swiglu.w1_w3_w2", "<5"),
        "MixtralDecoderLayer.forward": ("decoder_layer.pre_norm", ">=5"),
        "MixtralForCausalLM.forward": "causal_lm.moe",
    },
)
