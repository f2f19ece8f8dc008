"""SmolLM3."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "smollm3",
    {
        "SmolLM3RMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "SmolLM3MLP.forward": "swiglu.gate_up_down",
        "SmolLM3DecoderLayer.forward": "decoder_layer.pre_norm",
        "SmolLM3ForCausalLM.forward": "causal_lm.dense",
    },
)
