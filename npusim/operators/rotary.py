"""Rotary position embedding of a 4-D tensor, by halves or interleaved."""

from __future__ import annotations

import torch

from . import operator
from .limit import FLOATS, Limit

#: Vector cores of the device whose limits these are: Atlas A2.
_CORES = 48
_PAGE = "aclnnRotaryPositionEmbedding"
_GRAD_PAGE = "aclnnRotaryPositionEmbeddingGrad"

MODE = Limit("npu_rotary_mul", "rotary_mode is half or interleave", "'half'、'interleave'两种模式")
RANK = Limit("npu_rotary_mul", "the input, cos and sin have 4 dimensions", "4维Tensor")
DTYPE = Limit(
    "npu_rotary_mul", "float16, bfloat16 or float32", "数据类型float16, bfloat16, float32"
)
ONE_DTYPE = Limit(
    "npu_rotary_mul",
    "cos and sin have the input's dtype",
    "Consistent with the data type of x",
    page=f"{_PAGE}, cos and sin",
)
HEAD_SIZE = Limit("npu_rotary_mul", "the head size is even and less than 896", "D < 896")
COS_SHAPE = Limit("npu_rotary_mul", "cos and sin have one shape", "r2: 同r1")
LAYOUT = Limit(
    "npu_rotary_mul",
    "cos and sin are shared by the heads (BNSD: 11SD or B1SD; BSND: 1S1D or BS1D; SBND: S11D or "
    "SB1D; interleave: the first of each), or have the input's shape",
    "对应input layout的支持情况",
)
HALF_SIZES = Limit("npu_rotary_mul", "half: batch and heads are less than 1000", "B, N < 1000")
INTERLEAVE_SIZES = Limit(
    "npu_rotary_mul", "interleave: batch times heads is less than 1000", "B * N < 1000"
)
RANGE = Limit("npu_rotary_mul", "cos and sin are within [-1, 1]", "[-1, 1]; 对应input layout")
BNSD_ALIGNED = Limit(
    "npu_rotary_mul",
    "half, BNSD with 11SD, half a head a multiple of 32 bytes: batch x heads <= 8 x length",
    "When (D/2) % (32/inputDtypeSize) == 0, it must satisfy B * N <= S * 8",
    page=f"{_PAGE}, Constraints",
)
BNSD_UNALIGNED = Limit(
    "npu_rotary_mul",
    "half, BNSD with 11SD, half a head no multiple of 32 bytes: 2 x batch x heads <= length / "
    "cores, or a head size of at least 80",
    "it must satisfy B * N * 2 <= (S + coreNum -1) / coreNum or D >= 80",
    page=f"{_PAGE}, Constraints",
)
BACKWARD_BATCH = Limit(
    "npu_rotary_mul_backward",
    "half, BNSD with B1SD: the batch is smaller than the length",
    "when cos and sin are B1SD, the condition B < S must be satisfied",
    page=f"{_GRAD_PAGE}, Constraints",
)
BACKWARD_COS = Limit(
    "npu_rotary_mul",
    "half, where cos or sin needs a gradient: batch times heads is at most 1024",
    "B*N <= 1024",
)

# Layout -> the places of batch, heads and length in its shape.
_LAYOUTS = {"BNSD": (0, 1, 2), "BSND": (0, 2, 1), "SBND": (1, 2, 0)}


def _layouts(x: torch.Size, cos: torch.Size, shared_batch_only: bool) -> list[str]:
    """The layouts of the input that go with the shape of cos: cos has the length, 1 for heads."""
    found = []
    for name, (batch, heads, length) in _LAYOUTS.items():
        per_batch = cos[batch] == x[batch] and not shared_batch_only
        if cos[length] == x[length] and cos[heads] == 1 and (cos[batch] == 1 or per_batch):
            found.append(name)
    return found


def _shape_limits(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> list[str]:
    """Checks what forward and backward share; returns the layouts that the shapes may mean."""
    MODE.require(mode in ("half", "interleave"))
    RANK.require(x.dim() == cos.dim() == sin.dim() == 4)
    DTYPE.require(x.dtype in FLOATS)
    ONE_DTYPE.require(x.dtype == cos.dtype == sin.dtype)
    HEAD_SIZE.require(x.shape[3] % 2 == 0 and x.shape[3] < 896)
    COS_SHAPE.require(cos.shape == sin.shape)
    RANGE.require(not any((angle.abs() > 1).any() for angle in (cos, sin)))
    half = mode == "half"
    layouts = _layouts(x.shape, cos.shape, shared_batch_only=not half)
    same = half and x.shape == cos.shape
    LAYOUT.require(cos.shape[3] == x.shape[3] and (same or bool(layouts)))
    for name in layouts[:1]:
        batch, heads = (x.shape[place] for place in _LAYOUTS[name][:2])
        if half:
            HALF_SIZES.require(batch < 1000 and heads < 1000)
        else:
            INTERLEAVE_SIZES.require(batch * heads < 1000)
    return layouts


def _forward_limits(
    input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str
) -> None:
    _shape_limits(input, r1, r2, rotary_mode)
    batch, heads, length, size = input.shape
    differs = [own != shared for own, shared in zip(input.shape, r1.shape)]
    if rotary_mode == "half" and differs[0] and differs[1] and r1.shape[2] != 1:
        if size // 2 * input.element_size() % 32 == 0:
            BNSD_ALIGNED.require(batch * heads <= 8 * length)
        else:
            BNSD_UNALIGNED.require(2 * batch * heads <= -(-length // _CORES) or size >= 80)


def _backward_limits(
    grad: torch.Tensor, input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str
) -> None:
    layouts = _shape_limits(input, r1, r2, rotary_mode)
    if rotary_mode == "half" and layouts == ["BNSD"] and r1.shape[0] != 1:
        BACKWARD_BATCH.require(input.shape[0] < input.shape[2])
    if rotary_mode == "half" and (r1.requires_grad or r2.requires_grad):
        batch, heads = (input.shape[place] for place in _LAYOUTS[(layouts or ["BNSD"])[0]][:2])
        BACKWARD_COS.require(batch * heads <= 1024)


def _turned(x: torch.Tensor, mode: str) -> torch.Tensor:
    """A quarter turn: (a, b) -> (-b, a), where a pair is of halves or of neighbours."""
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


@operator("npu_rotary_mul", limits=_forward_limits)
def rotary_mul(
    input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str
) -> torch.Tensor:
    """input * cos + turned(input) * sin, computed in float32."""
    x = input.float()
    return (x * r1.float() + _turned(x, rotary_mode) * r2.float()).to(input.dtype)


@operator("npu_rotary_mul_backward", limits=_backward_limits)
def rotary_mul_backward(
    grad: torch.Tensor, input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g, x = grad.float(), input.float()
    dx = g * r1.float() - _turned(g * r2.float(), rotary_mode)  # a turn's transpose is its negative
    dcos = (g * x).sum_to_size(r1.shape)
    dsin = (g * _turned(x, rotary_mode)).sum_to_size(r2.shape)
    return dx.to(input.dtype), dcos.to(input.dtype), dsin.to(input.dtype)
