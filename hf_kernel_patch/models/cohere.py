"""Cohere's Command R: layer norms and an interleaved rotary, of which no form is here."""

from hf_kernel_patch.models.table import Architecture

ARCHITECTURE = Architecture(
    "cohere",
    {
        "apply_rotary_pos_emb": "rope.interleaved",
        "CohereMLP.forward": "gated_product",
        "CohereForCausalLM.forward": "head_loss",
    },
)
