"""Cohere's Command R7B and Command A, as Cohere's."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "cohere2",
    {
        "Cohere2MLP.forward": "gated_product",
        "Cohere2ForCausalLM.forward": "head_loss",
    },
)
