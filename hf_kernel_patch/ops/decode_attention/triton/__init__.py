"""decode_attention in Triton. The kernel is imported together with this package, at first use."""

from hf_kernel_patch.ops.decode_attention.triton.op import decode_attention

__all__ = ["decode_attention"]
