"""GPT-OSS: gated experts with biases, and a rotary of its own."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "gpt_oss",
    {
        "GptOssRMSNorm.forward": "rms_norm.olmo2",
        "apply_rotary_pos_emb": "rope.gpt_oss",
        "GptOssExperts.forward": ("moe.gated", ">=5"),
        "GptOssForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "GptOssDecoderLayer.forward": "residual_norm",
        "GptOssForCausalLM.forward": "head_loss",
    },
    transformers=">=4.55",
)
