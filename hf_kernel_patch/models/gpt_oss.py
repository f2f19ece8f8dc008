"""GPT-OSS: experts and a rotary of its own, of which no kernel is here."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "gpt_oss",
    {
        "GptOssRMSNorm.forward": "rms_norm.olmo2",
        "GptOssExperts.forward": "moe.interleaved",
        "GptOssDecoderLayer.forward": "residual_norm",
        "GptOssForCausalLM.forward": "head_loss",
    },
    transformers=">=4.55",
)
