"""RMSNorm as the model families write it: its orders of casting and multiplying, and its gates."""

from hf_kernel_patch.recognition.leaves.norms import gated, weightless
from hf_kernel_patch.recognition.leaves.norms.plain import LEAVES, Norm
from hf_kernel_patch.recognition.leaves.norms.spanned import (
    modeling_of,
    norm_arguments,
    norm_of,
    norms_in,
    own_class,
)
from hf_kernel_patch.recognition.leaves.norms.texts import LLAMA

__all__ = [
    "LEAVES",
    "LLAMA",
    "Norm",
    "gated",
    "modeling_of",
    "norm_arguments",
    "norm_of",
    "norms_in",
    "own_class",
    "weightless",
]
