"""The forms: canonical pieces of Hugging Face code, and how each becomes an op's call."""

from hf_kernel_patch.forms import (
    attention,
    causal_lm,
    decoder_layer,
    experts,
    experts_decoding,
    experts_interface,
    experts_list,
    mlp,
    rms_norm,
    rope,
)
from hf_kernel_patch.forms.form import Form, build, forms, register_form
from hf_kernel_patch.forms.site import Site

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
    "register_form",
    "rms_norm",
    "rope",
]
