"""Cohere's Command R: layer norms without a kernel, and a rotary of neighbours."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "cohere",
    {
        "apply_rotary_pos_emb": "rope.interleaved",
        "CohereMLP.forward": "gated_product",
        "CohereForCausalLM.forward": "head_loss",
    },
)
