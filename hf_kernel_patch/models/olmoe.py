"""OLMoE."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "olmoe",
    {
        "OlmoeRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "OlmoeMLP.forward": ("gated_product", "<5"),
        "OlmoeExperts.forward": ("moe.stacked", ">=5"),
        "OlmoeForCausalLM._optimize_model_for_decode": ("moe.decoding", ">=5"),
        "OlmoeDecoderLayer.forward": "residual_norm",
        "OlmoeForCausalLM.forward": "head_loss",
    },
)
