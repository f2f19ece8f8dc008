"""Llama 2, 3 and the many models of that shape."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "llama",
    {
        "LlamaRMSNorm.forward": "rms_norm.llama",
        "apply_rotary_pos_emb": "rope.full",
        "LlamaMLP.forward": "swiglu.gate_up_down",
        "LlamaDecoderLayer.forward": "decoder_layer.pre_norm",
        "LlamaForCausalLM.forward": "causal_lm.dense",
    },
)
