"""Known code: leaves and rules, how they are recognised, and how a function is written anew."""

from hf_kernel_patch.recognition.composing import Composed, Request, composed, request, why_not
from hf_kernel_patch.recognition.edits import replace
from hf_kernel_patch.recognition.known import Found, Known, Leaf, Rule, build, known, register
from hf_kernel_patch.recognition.leaves import (
    experts,
    experts_decoding,
    experts_gated,
    experts_interface,
    experts_list,
    norms,
    rotary,
)
from hf_kernel_patch.recognition.rules import (
    decoding,
    gated_product,
    head_loss,
    lora,
    qk_norm_rope,
    residual_norm,
)
from hf_kernel_patch.recognition.site import Site

__all__ = [
    "Composed",
    "Found",
    "Known",
    "Leaf",
    "Request",
    "Rule",
    "Site",
    "build",
    "composed",
    "decoding",
    "experts",
    "experts_decoding",
    "experts_gated",
    "experts_interface",
    "experts_list",
    "gated_product",
    "head_loss",
    "known",
    "lora",
    "norms",
    "qk_norm_rope",
    "register",
    "replace",
    "request",
    "residual_norm",
    "rotary",
    "why_not",
]
