"""Cohere's Command R7B and Command A, as Cohere's."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "cohere2",
    {
        "apply_rotary_pos_emb": "rope.interleaved",
        "Cohere2MLP.forward": "gated_product",
        "Cohere2ForCausalLM.forward": "head_loss",
    },
)
