"""Every limit of the simulated operators refuses a call, and is in the wheel's documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

from npusim.operators import (
    gated,
    grouped_matmul,
    limits,
    loss,
    moe,
    rms_norm,
    rotary,
)
from npusim.operators.limit import Limit, Refused

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
I32, I64 = torch.int32, torch.int64


def some(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device="npu").requires_grad_(grad)


def integers(values: Any, dtype: torch.dtype = I64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device="npu")


def norm(x: torch.Tensor, gamma: torch.Tensor) -> Any:
    return torch_npu.npu_rms_norm(x, gamma)


def rotate(x: tuple[int, ...], cos: tuple[int, ...], mode: str = "half", **angles: Any) -> Any:
    grad = angles.pop("grad", False)
    angle = some(*cos, **angles, grad=grad)
    return torch_npu.npu_rotary_mul(some(*x, grad=grad), angle, angle, mode)


def rotate_by(angle: float) -> Any:
    angles = some(1, 3, 1, 32) * angle
    return torch_npu.npu_rotary_mul(some(1, 3, 2, 32), angles, angles)


def rotate_back(x: tuple[int, ...], cos: tuple[int, ...], grad: bool = False) -> Any:
    angle = some(*cos, grad=grad)
    out = torch_npu.npu_rotary_mul(some(*x, grad=True), angle, angle)
    return out.backward(torch.ones_like(out))


def permute(
    tokens: torch.Tensor | None = None, indices: torch.Tensor | None = None, **options: Any
) -> Any:
    tokens = some(3, 4) if tokens is None else tokens
    indices = integers([[0, 1]] * 3) if indices is None else indices
    return torch_npu.npu_moe_token_permute(tokens, indices, **options)


def unpermute(
    tokens: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    probs: torch.Tensor | None = None,
    **options: Any,
) -> Any:
    tokens = some(6, 4) if tokens is None else tokens
    indices = integers([5, 4, 3, 2, 1, 0], I32) if indices is None else indices
    return torch_npu.npu_moe_token_unpermute(tokens, indices, probs, **options)


def product(x: Any = None, weight: Any = None, group_list: Any = ..., **options: Any) -> Any:
    """Three rows, in groups of one and two; by default within every limit."""
    given = {"group_type": 0, "split_item": 2, "group_list_type": 1, **options}
    return torch_npu.npu_grouped_matmul(
        [some(3, 4)] if x is None else x,
        [some(2, 4, 5)] if weight is None else weight,
        group_list=integers([1, 2]) if group_list is ... else group_list,
        **given,
    )


def weight_gradient(x: torch.Tensor, grad: torch.Tensor) -> Any:
    return product([x], [grad], group_type=2, split_item=3)


def by_list(group_list: list[int], **options: Any) -> Any:
    return torch_npu.npu_grouped_matmul(
        [some(3, 4)], [some(4, 5)] * 2, group_list=group_list, split_item=2, **options
    )


def cross_entropy(x: torch.Tensor, target: Any, **options: Any) -> Any:
    target = target if isinstance(target, torch.Tensor) else integers(target)
    return torch_npu.npu_cross_entropy_loss(x, target, **options)


matmul = grouped_matmul

BREACHES: dict[Limit, Callable[[], Any]] = {
    rms_norm.DTYPE: lambda: norm(some(2, 4, dtype=F64).int(), some(4).int()),
    rms_norm.RANK: lambda: norm(some(4), some(4)),
    rms_norm.GAMMA_DTYPE: lambda: norm(some(2, 4), some(4, dtype=F32)),
    rms_norm.GAMMA_SHAPE: lambda: norm(some(2, 4), some(1)),
    rms_norm.BACKWARD_DTYPE: lambda: torch.ops.npu.npu_rms_norm_backward(
        some(2, 4, dtype=F32), some(2, 4), some(4), some(2, 1, dtype=F32)
    ),
    rms_norm.GEMMA_DTYPE: lambda: torch_npu.npu_gemma_rms_norm(some(2, 4), some(4, dtype=F32)),
    rms_norm.GEMMA_GAMMA_SHAPE: lambda: torch_npu.npu_gemma_rms_norm(some(2, 4), some(2)),
    rms_norm.GEMMA_CONTIGUOUS: lambda: torch_npu.npu_gemma_rms_norm(some(4, 2).t(), some(4)),
    rms_norm.ADD_DTYPE: lambda: torch_npu.npu_add_rms_norm(
        some(2, 4), some(2, 4), some(4, dtype=F32)
    ),
    rms_norm.ADD_SHAPE: lambda: torch_npu.npu_add_rms_norm(some(2, 4), some(1, 4), some(4)),
    gated.SWIGLU_DTYPE: lambda: torch_npu.npu_swiglu(integers([1, 2])),
    gated.SWIGLU_RANK: lambda: torch_npu.npu_swiglu(some(*[1] * 8, 2)),
    gated.SWIGLU_EVEN: lambda: torch_npu.npu_swiglu(some(2, 3)),
    gated.SWIGLU_CONTIGUOUS: lambda: torch_npu.npu_swiglu(some(4, 2).t()),
    gated.SWIGLU_GRAD_CONTIGUOUS: lambda: torch_npu.npu_swiglu(some(2, 8, grad=True)).backward(
        some(4, 2).t()
    ),
    gated.SWIGLU_GRAD_EMPTY: lambda: torch_npu.npu_swiglu(some(0, 8, grad=True)).sum().backward(),
    gated.GEGLU_DTYPE: lambda: torch_npu.npu_geglu(integers([1, 2])),
    gated.GEGLU_APPROXIMATE: lambda: torch_npu.npu_geglu(some(2, 4), approximate=2),
    gated.GEGLU_EVEN: lambda: torch_npu.npu_geglu(some(2, 2, 4), dim=-4),
    rotary.MODE: lambda: rotate((1, 2, 3, 8), (1, 1, 3, 8), "quarter"),
    rotary.RANK: lambda: rotate((2, 3, 8), (1, 3, 8)),
    rotary.DTYPE: lambda: torch_npu.npu_rotary_mul(*[integers([[[[1, 2]]]])] * 3),
    rotary.ONE_DTYPE: lambda: rotate((1, 2, 3, 8), (1, 1, 3, 8), dtype=F32),
    rotary.HEAD_SIZE: lambda: rotate((1, 2, 3, 896), (1, 1, 3, 896)),
    rotary.COS_SHAPE: lambda: torch_npu.npu_rotary_mul(
        some(2, 2, 3, 8), some(1, 1, 3, 8), some(2, 1, 3, 8)
    ),
    rotary.LAYOUT: lambda: rotate((2, 4, 3, 8), (1, 4, 3, 8)),
    rotary.HALF_SIZES: lambda: rotate((1, 3, 1000, 8), (1, 3, 1, 8)),
    rotary.INTERLEAVE_SIZES: lambda: rotate((10, 3, 100, 8), (1, 3, 1, 8), "interleave"),
    rotary.RANGE: lambda: rotate_by(1.01),
    rotary.BNSD_ALIGNED: lambda: rotate((5, 5, 3, 32), (1, 1, 3, 32)),
    rotary.BNSD_UNALIGNED: lambda: rotate((2, 2, 48, 8), (1, 1, 48, 8)),
    rotary.BACKWARD_BATCH: lambda: rotate_back((3, 2, 3, 8), (3, 1, 3, 8)),
    rotary.BACKWARD_COS: lambda: rotate_back((5, 3, 250, 8), (1, 3, 1, 8), grad=True),
    moe.PERMUTE_TOKENS: lambda: permute(some(3, 4, 1)),
    moe.PERMUTE_INDICES: lambda: permute(indices=integers([[0], [1], [2]], torch.int16)),
    moe.PERMUTE_ROWS: lambda: permute(indices=integers([[0, 1]])),
    moe.PERMUTE_VALUES: lambda: permute(indices=integers([[0, -1]] * 3)),
    moe.PERMUTE_CHOICES: lambda: permute(indices=integers([[0] * 513] * 3)),
    moe.PERMUTE_PADDED: lambda: permute(padded_mode=True),
    moe.UNPERMUTE_TOKENS: lambda: unpermute(some(5, 4)),
    moe.UNPERMUTE_INDICES: lambda: unpermute(indices=integers([5, 4, 3, 2, 1, 0], I64)),
    moe.UNPERMUTE_VALUES: lambda: unpermute(indices=integers([5, 4, 3, 2, 1, 1], I32)),
    moe.UNPERMUTE_PROBS: lambda: unpermute(probs=some(6)),
    moe.UNPERMUTE_CHOICES: lambda: unpermute(
        some(513, 4), torch.arange(513, dtype=I32, device="npu"), some(1, 513)
    ),
    moe.UNPERMUTE_PADDED: lambda: unpermute(padded_mode=True),
    matmul.LISTS: lambda: product(weight=[some(4, 5)] * 129, group_list=integers([0] * 128 + [3])),
    matmul.DTYPES: lambda: product([some(3, 4, dtype=F16)]),
    matmul.FLOAT32_SINGLE: lambda: product([some(3, 4, dtype=F32)], [some(4, 5, dtype=F32)] * 2),
    matmul.INNER: lambda: product([some(3, 65536)], [some(2, 65536, 1)]),
    matmul.GROUP_TYPE: lambda: product(group_type=None),
    matmul.GROUP_LIST: lambda: product(group_list=integers([1, 2], I32)),
    matmul.GROUP_LIST_TYPE: lambda: product(group_list_type=2),
    matmul.ONE_GROUP: lambda: product(weight=[some(1, 4, 5)], group_list=integers([3])),
    matmul.GROUPS: lambda: product(weight=[some(1025, 4, 5)], group_list=integers([0] * 1025)),
    matmul.GROUPS_ARE_WEIGHTS: lambda: product(weight=[some(3, 4, 5)]),
    matmul.GROUP_VALUES: lambda: product(group_list=integers([1, 3])),
    matmul.SPLIT_SINGLE: lambda: product(split_item=0),
    matmul.SPLIT_MULTIPLE: lambda: product(group_type=-1, group_list=None),
    matmul.NO_GROUPS: lambda: product(group_type=-1, split_item=0),
    matmul.SHAPES: lambda: product([some(1, 3, 4)]),
    matmul.X_TRANSPOSED: lambda: product([some(4, 3).t()]),
    matmul.ONE_WAY: lambda: product(weight=[some(4, 5), some(5, 4).t()]),
    matmul.K_SHAPES: lambda: weight_gradient(some(3, 4).t(), some(3, 5, 1)),
    matmul.K_X_TRANSPOSED: lambda: weight_gradient(some(4, 3), some(3, 5)),
    matmul.K_WEIGHT: lambda: weight_gradient(some(3, 4).t(), some(5, 3).t()),
    matmul.LIST_GROUP_TYPE: lambda: by_list([1, 3], group_type=0),
    matmul.LIST_ENDS: lambda: by_list([1, 2]),
    loss.INPUT: lambda: cross_entropy(some(1, 2, 3), [0]),
    loss.TARGET: lambda: cross_entropy(some(2, 3), integers([0, 1], I32)),
    loss.ROWS: lambda: cross_entropy(some(0, 3), integers([])),
    loss.VALUES: lambda: cross_entropy(some(2, 3), [0, -100]),
    loss.REDUCTION: lambda: cross_entropy(some(2, 3), [0, 1], reduction="max"),
    loss.DEFAULTS: lambda: cross_entropy(some(2, 3, grad=True), [0, 1], ignore_index=1),
}


def name(limit: Limit) -> str:
    return f"{limit.operator}: {limit.rule}"


def test_every_limit_has_a_call_that_breaks_it() -> None:
    assert set(limits()) == set(BREACHES)


@pytest.mark.parametrize("limit", BREACHES, ids=name)
def test_a_call_outside_a_limit_is_refused_by_that_limit(limit: Limit) -> None:
    with pytest.raises(Refused) as raised:
        BREACHES[limit]()
    assert raised.value.limit == limit
    assert limit.operator in str(raised.value)
    assert limit.says in str(raised.value)


@pytest.mark.parametrize("limit", [known for known in BREACHES if known.page is None], ids=name)
def test_the_wheel_says_so_in_its_docstring(limit: Limit) -> None:
    assert limit.says in getattr(torch_npu, limit.operator).__doc__


WITHIN: dict[str, Callable[[], Any]] = {
    "rotary, BSND that would be too many heads as BNSD": lambda: rotate(
        (5, 3, 5, 32), (1, 3, 1, 32)
    ),
    "rotary, angles that are NaN": lambda: rotate_by(float("nan")),
    "rotary, one token": lambda: rotate((5, 5, 1, 32), (1, 1, 1, 32)),
    "rotary, cos of every sequence as BNSD": lambda: rotate((5, 5, 6, 32), (5, 1, 6, 32)),
    "rotary, cos of the input's shape": lambda: rotate((5, 5, 3, 32), (5, 5, 3, 32)),
    "rotary, backward of BSND with more sequences than tokens": lambda: rotate_back(
        (5, 3, 2, 8), (5, 3, 1, 8)
    ),
    "permute, an index past the experts": lambda: permute(indices=integers([[0, 99]] * 3)),
    "unpermute, weights of another dtype": lambda: unpermute(probs=some(3, 2, dtype=F32)),
    "product, groups that end before the rows": lambda: product(group_list=integers([1, 1])),
    "product, transposed weights": lambda: product(weight=[some(2, 5, 4).mT]),
    "product, 1024 groups": lambda: product(
        weight=[some(1024, 4, 1)], group_list=integers([0] * 1024)
    ),
    "product, a slice of wider rows": lambda: product([some(3, 8)[:, :4]]),
    "product, sums for group_list": lambda: product(group_list=integers([0, 3]), group_list_type=0),
    "loss, an ignored class without a gradient": lambda: cross_entropy(
        some(2, 3), [0, 1], ignore_index=1
    ),
}


@pytest.mark.parametrize("call", WITHIN.values(), ids=WITHIN)
def test_a_call_within_the_limits_is_not_refused(call: Callable[[], Any]) -> None:
    call()
