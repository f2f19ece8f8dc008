"""The forms: canonical pieces of Hugging Face code, and how each becomes an op's call."""

from hf_kernel_patch.recognition.form import Form, build, forms, register_form
from hf_kernel_patch.recognition.leaves import (
    experts,
    experts_decoding,
    experts_interface,
    experts_list,
    norms,
    rotary,
)
from hf_kernel_patch.recognition.rules import attention, causal_lm, decoder_layer, mlp
from hf_kernel_patch.recognition.site import Site

__all__ = [
    "Form",
    "Site",
    "attention",
    "build",
    "causal_lm",
    "decoder_layer",
    "experts",
    "experts_decoding",
    "experts_interface",
    "experts_list",
    "forms",
    "mlp",
    "norms",
    "register_form",
    "rotary",
]
