"""Qwen3-VL-MoE: the text model; its experts are stacked the other way round in transformers 4."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "qwen3_vl_moe",
    {
        "Qwen3VLMoeTextRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "Qwen3VLMoeTextMLP.forward": "swiglu.gate_up_down",
        "Qwen3VLMoeTextExperts.forward": ("moe.stacked", ">=5"),
        "Qwen3VLMoeForConditionalGeneration._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "Qwen3VLMoeTextAttention.forward": "attention.qk_norm",
        "Qwen3VLMoeTextDecoderLayer.forward": "decoder_layer.pre_norm",
    },
)
