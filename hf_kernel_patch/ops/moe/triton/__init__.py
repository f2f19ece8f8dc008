"""moe in Triton. The kernels are imported together with this package, at their first use."""

from hf_kernel_patch.ops.moe.triton.op import moe

__all__ = ["moe"]
