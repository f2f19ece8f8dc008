"""Cohere's Command R7B and Command A, as Cohere's."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "cohere2",
    {
        "Cohere2MLP.forward": "swiglu.gate_up_down",
        "Cohere2ForCausalLM.forward": "causal_lm.multiplied",
    },
)
