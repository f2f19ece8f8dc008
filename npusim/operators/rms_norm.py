"""RMSNorm: plain, with Gemma's 1 + weight, and after a residual addition."""

from __future__ import annotations

import torch

from . import operator
from .limit import FLOATS, Limit

DTYPE = Limit(
    "npu_rms_norm",
    "the input is float16, bfloat16 or float32",
    "输入数据类型仅支持float16、bfloat16和float32",
)
RANK = Limit("npu_rms_norm", "the input has 2 to 8 dimensions", "输入shape支持2-8维")
GAMMA_DTYPE = Limit("npu_rms_norm", "gamma has the input's dtype", "数据类型需要和self保持一致")
GAMMA_SHAPE = Limit(
    "npu_rms_norm",
    "gamma has the shape of the input's last dimensions",
    "gamma_shape = x_shape[n:], n < x_shape.dims()",
    page="aclnnRmsNorm",
)
BACKWARD_DTYPE = Limit(
    "npu_rms_norm_backward",
    "dy, the input and gamma have one dtype, rstd is float32",
    "Description of data types supported by different products",
    page="aclnnRmsNormGrad, Constraints",
)
GEMMA_DTYPE = Limit("npu_gemma_rms_norm", "gamma has the input's dtype", "与input数据类型保持一致")
GEMMA_GAMMA_SHAPE = Limit(
    "npu_gemma_rms_norm",
    "gamma has the shape of the input's last dimensions",
    "gamma_shape = input_shape\\[n:\\], n < input_shape.dims()",
)
GEMMA_CONTIGUOUS = Limit("npu_gemma_rms_norm", "inputs are contiguous", "不支持非连续tensor")
ADD_DTYPE = Limit(
    "npu_add_rms_norm",
    "x1, x2 and gamma have one dtype",
    "The data type must be the same as that of x1",
    page="aclnnAddRmsNorm, gamma",
)
ADD_SHAPE = Limit(
    "npu_add_rms_norm",
    "x1 and x2 have one shape, gamma that of its last dimensions",
    "The shape and data type must be the same as those of x1",
    page="aclnnAddRmsNorm, x2",
)


def _ends_with(shape: torch.Size, gamma: torch.Size) -> bool:
    return 0 < len(gamma) <= len(shape) and shape[-len(gamma) :] == gamma


def _forward_limits(input: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> None:
    DTYPE.require(input.dtype in FLOATS)
    RANK.require(2 <= input.dim() <= 8)
    GAMMA_DTYPE.require(gamma.dtype == input.dtype)
    GAMMA_SHAPE.require(_ends_with(input.shape, gamma.shape))


def _backward_limits(
    dy: torch.Tensor, input: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor
) -> None:
    BACKWARD_DTYPE.require(dy.dtype == input.dtype == gamma.dtype and rstd.dtype == torch.float32)


def _gemma_limits(input: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> None:
    GEMMA_DTYPE.require(gamma.dtype == input.dtype and input.dtype in FLOATS)
    GEMMA_GAMMA_SHAPE.require(_ends_with(input.shape, gamma.shape))
    GEMMA_CONTIGUOUS.require(input.is_contiguous() and gamma.is_contiguous())


def _add_limits(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> None:
    ADD_DTYPE.require(x1.dtype == x2.dtype == gamma.dtype and x1.dtype in FLOATS)
    ADD_SHAPE.require(x1.shape == x2.shape and _ends_with(x1.shape, gamma.shape))


def _normalised(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The input over its root mean square, and that root's reciprocal, both in float32."""
    dims = tuple(range(input.dim() - gamma.dim(), input.dim()))
    rstd = torch.rsqrt(input.float().pow(2).mean(dims, keepdim=True) + epsilon)
    return input.float() * rstd, rstd


@operator("npu_rms_norm", limits=_forward_limits)
def rms_norm(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(*, *gamma.shape) -> the same, and rstd of the leading dimensions, 1 for each of gamma's."""
    normalised, rstd = _normalised(input, gamma, epsilon)
    return (normalised * gamma.float()).to(input.dtype), rstd


@operator("npu_rms_norm_backward", limits=_backward_limits)
def rms_norm_backward(
    dy: torch.Tensor, input: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the input, in its dtype, and of gamma, in float32."""
    rows, dims = input.dim() - gamma.dim(), tuple(range(input.dim() - gamma.dim(), input.dim()))
    normalised = input.float() * rstd
    scaled = dy.float() * gamma.float()
    dx = rstd * (scaled - normalised * (scaled * normalised).mean(dims, keepdim=True))
    dgamma = (dy.float() * normalised).sum(tuple(range(rows))) if rows else dy.float() * normalised
    return dx.to(input.dtype), dgamma


@operator("npu_gemma_rms_norm", limits=_gemma_limits)
def gemma_rms_norm(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``rms_norm``, by 1 + gamma. The wheel has no backward for it."""
    normalised, rstd = _normalised(input, gamma, epsilon)
    return (normalised * (1 + gamma.float())).to(input.dtype), rstd


@operator("npu_add_rms_norm", limits=_add_limits)
def add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of x1 + x2, its rstd, and the sum. The wheel raises in its backward."""
    total = x1 + x2
    normalised, rstd = _normalised(total, gamma, epsilon)
    return (normalised * gamma.float()).to(x1.dtype), rstd, total
