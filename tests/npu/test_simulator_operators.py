"""The simulated operators, forward and backward, against PyTorch on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch_npu
from torch.nn import functional as F

from tests.support.tiny import error

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
#: ||found - truth|| / ||truth||: a few roundings of the result, which are all there are.
TOLERANCE = {F32: 2e-6, F16: 1e-3, BF16: 6e-3}
CALLS = Callable[[], dict[str, int]]


class Case(NamedTuple):
    """An operator, PyTorch for the same, their inputs' shapes, and the operators that run."""

    name: str
    operator: Callable[..., Any]
    truth: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    runs: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (F32, F16, BF16)
    scale: float = 1.0


def halves(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def neighbours(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


CHOICES = torch.tensor([[2, 0], [1, 2], [0, 3], [3, 2], [2, 1]])
ORDER = CHOICES.flatten().argsort(stable=True)
PLACES = ORDER.argsort().int()
COUNTS = [2, 0, 3, 1]
LABELS = torch.tensor([1, 0, 4, 2])


def rows(x: torch.Tensor, weight: Any) -> torch.Tensor:
    return torch.cat([part @ matrix for part, matrix in zip(x.split(COUNTS), weight)])


def permuted(t: torch.Tensor, kept: int) -> Any:
    return torch_npu.npu_moe_token_permute(t, CHOICES.npu(), kept)[0]


def gelu_gated(x: torch.Tensor, left: bool) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    gate, up = (first, second) if left else (second, first)
    return F.gelu(gate, approximate="tanh") * up


def rotary_case(name: str, x: tuple[int, ...], cos: tuple[int, ...], mode: str = "half") -> Case:
    turn = halves if mode == "half" else neighbours
    return Case(
        f"rotary_mul, {name}",
        lambda x, c, s: torch_npu.npu_rotary_mul(x, c, s, mode),
        lambda x, c, s: x * c + turn(x) * s,
        (x, cos, cos),
        ("npu_rotary_mul", "npu_rotary_mul_backward"),
        scale=1 / 8,  # cos and sin within [-1, 1]
    )


_UNPERMUTE = ("npu_moe_token_unpermute", "npu_moe_token_unpermute_grad_v2")
CASES = [
    Case(
        "rms_norm",
        lambda x, g: torch_npu.npu_rms_norm(x, g, epsilon=1e-5)[0],
        lambda x, g: F.rms_norm(x, (24,), g, 1e-5),
        ((3, 5, 24), (24,)),
        ("npu_rms_norm", "npu_rms_norm_backward"),
    ),
    Case(
        "rms_norm over two dimensions",
        lambda x, g: torch_npu.npu_rms_norm(x, g)[0],
        lambda x, g: F.rms_norm(x, (5, 24), g, 1e-6),
        ((3, 5, 24), (5, 24)),
        ("npu_rms_norm", "npu_rms_norm_backward"),
    ),
    Case(
        "swiglu",
        lambda x: torch_npu.npu_swiglu(x),
        lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        ((3, 5, 24),),
        ("npu_swiglu", "npu_swiglu_backward"),
    ),
    Case(
        "swiglu along the first dimension",
        lambda x: torch_npu.npu_swiglu(x, 0),
        lambda x: F.silu(x.chunk(2, 0)[0]) * x.chunk(2, 0)[1],
        ((4, 5),),
        ("npu_swiglu", "npu_swiglu_backward"),
    ),
    Case(
        "geglu",
        lambda x: torch_npu.npu_geglu(x)[0],
        lambda x: gelu_gated(x, left=False),
        ((3, 5, 24),),
        ("npu_geglu", "npu_geglu_grad"),
    ),
    Case(
        "geglu of the left half",
        lambda x: torch_npu.npu_geglu(x, activate_left=True)[0],
        lambda x: gelu_gated(x, left=True),
        ((3, 5, 24),),
        ("npu_geglu", "npu_geglu_grad"),
    ),
    Case(
        "gelu",
        lambda x: torch_npu.npu_gelu(x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        ((3, 24),),
        ("npu_gelu", "npu_gelu_backward"),
    ),
    rotary_case("BNSD", (2, 3, 7, 32), (1, 1, 7, 32)),
    rotary_case("BNSD, cos of every sequence", (2, 3, 7, 8), (2, 1, 7, 8)),
    rotary_case("BSND", (2, 7, 3, 8), (1, 7, 1, 8)),
    rotary_case("SBND", (7, 2, 3, 8), (7, 1, 1, 8)),
    rotary_case("interleave", (2, 7, 3, 8), (1, 7, 1, 8), "interleave"),
    Case(
        "token_permute",
        lambda t: permuted(t, 0),
        lambda t: t[ORDER // 2],
        ((5, 6),),
        ("npu_moe_token_permute", "npu_moe_token_permute_grad_v2"),
    ),
    Case(
        "token_permute that drops rows",
        lambda t: permuted(t, 7),
        lambda t: t[ORDER[:7] // 2],
        ((5, 6),),
        ("npu_moe_token_permute", "npu_moe_token_permute_grad_v2"),
    ),
    Case(
        "token_unpermute",
        lambda t, p: torch_npu.npu_moe_token_unpermute(t, PLACES.npu(), p),
        lambda t, p: (t[PLACES.long()].view(5, 2, 6) * p.unsqueeze(-1)).sum(1),
        ((10, 6), (5, 2)),
        _UNPERMUTE,
    ),
    Case(
        "token_unpermute without weights",
        lambda t: torch_npu.npu_moe_token_unpermute(t, PLACES.npu()),
        lambda t: t[PLACES.long()],
        ((10, 6),),
        _UNPERMUTE,
    ),
    Case(
        "cross_entropy_loss",
        lambda x: torch_npu.npu_cross_entropy_loss(x, LABELS.npu())[0],
        lambda x: F.cross_entropy(x, LABELS).reshape(1),
        ((4, 5),),
        ("npu_cross_entropy_loss", "npu_cross_entropy_loss_backward"),
    ),
    Case(
        "attention",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        ((2, 4, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
        ("npu_fusion_attention_v3", "npu_fusion_attention_grad_v3"),
    ),
    Case(
        "matmul",
        torch.matmul,
        torch.matmul,
        ((2, 3, 5), (5, 4)),
        ("matmul", "matmul_backward"),
    ),
]
RUNS = [(case, dtype) for case in CASES for dtype in case.dtypes]


def inputs(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, scale: float = 1.0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=lambda x: getattr(x, "name", str(x)))
def test_operator_and_its_backward_are_pytorchs(
    case: Case, dtype: torch.dtype, calls: CALLS
) -> None:
    given = inputs(case.shapes, dtype, case.scale)
    ours = [tensor.npu().requires_grad_() for tensor in given]
    theirs = [tensor.float().requires_grad_() for tensor in given]
    found, truth = case.operator(*ours), case.truth(*theirs)
    assert (found.device.type, found.dtype, found.shape) == ("npu", dtype, truth.shape)
    assert error(found.detach().cpu(), truth.detach()) <= TOLERANCE[dtype]
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found.backward(grad.npu())
    truth.backward(grad.float())
    for own, other in zip(ours, theirs):
        assert own.grad is not None and other.grad is not None
        assert own.grad.dtype == dtype
        assert error(own.grad.cpu(), other.grad) <= TOLERANCE[dtype]
    assert all(calls()[name] == 1 for name in case.runs)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("sums", [False, True], ids=["sizes", "sums"])
def test_grouped_matmul_gives_the_product_and_both_gradients(
    dtype: torch.dtype, sums: bool
) -> None:
    x, stack, grad = inputs(((6, 5), (4, 5, 3), (6, 3)), dtype)
    counts = torch.tensor(COUNTS).cumsum(0) if sums else torch.tensor(COUNTS)
    a, b = (t.clone().float().requires_grad_() for t in (x, stack))
    truth = rows(a, b)
    truth.backward(grad.float())

    def product(left: torch.Tensor, right: torch.Tensor, group_type: int) -> torch.Tensor:
        (out,) = torch_npu.npu_grouped_matmul(
            [left],
            [right],
            group_list=counts.npu(),
            group_type=group_type,
            split_item=2,
            group_list_type=int(not sums),
        )
        return out.cpu()

    on_device, up = x.npu(), grad.npu()
    assert error(product(on_device, stack.npu(), 0), truth.detach()) <= TOLERANCE[dtype]
    assert error(product(up, stack.npu().mT, 0), a.grad) <= TOLERANCE[dtype]
    assert error(product(on_device.t(), up, 2), b.grad) <= TOLERANCE[dtype]


@pytest.mark.parametrize("ends", [False, True], ids=["sizes on the device", "ends on the host"])
def test_grouped_matmul_takes_a_list_of_matrices(ends: bool) -> None:
    x, *weight = inputs(((6, 5), *[(5, 3)] * 4), BF16)
    if ends:
        groups: dict[str, Any] = {"group_list": [2, 2, 5, 6]}
    else:
        sizes = torch.tensor(COUNTS).npu()
        groups = {"group_list": sizes, "group_type": 0, "group_list_type": 1}
    device = [matrix.npu() for matrix in weight]
    (out,) = torch_npu.npu_grouped_matmul([x.npu()], device, split_item=2, **groups)
    assert error(out.cpu(), rows(x.float(), [w.float() for w in weight])) <= TOLERANCE[BF16]


def test_grouped_matmul_without_groups_takes_two_lists() -> None:
    left, right = inputs(((6, 5), (2, 3)), BF16), inputs(((5, 3), (3, 4)), BF16)
    found = torch_npu.npu_grouped_matmul(
        [t.npu() for t in left], [t.npu() for t in right], group_type=-1
    )
    for out, a, b in zip(found, left, right, strict=True):
        assert error(out.cpu(), a.float() @ b.float()) <= TOLERANCE[BF16]


def test_rows_past_the_last_group_are_not_written() -> None:
    (out,) = torch_npu.npu_grouped_matmul(
        [torch.ones(3, 4).npu()],
        [torch.ones(2, 4, 5).npu()],
        group_list=torch.tensor([1, 1]).npu(),
        group_type=0,
        split_item=2,
        group_list_type=1,
    )
    assert out.isnan().any(1).tolist() == [False, False, True]


def test_norms_without_a_backward_are_pytorchs_forward_and_refuse_gradients() -> None:
    x, residual, gamma = inputs(((3, 24), (3, 24), (24,)), F32)
    total = x + residual
    out, _, added = torch_npu.npu_add_rms_norm(x.npu(), residual.npu(), gamma.npu())
    assert torch.equal(added.cpu(), total)
    assert error(out.cpu(), F.rms_norm(total, (24,), gamma, 1e-6)) <= TOLERANCE[F32]
    shifted, _ = torch_npu.npu_gemma_rms_norm(x.npu(), gamma.npu())
    assert error(shifted.cpu(), F.rms_norm(x, (24,), 1 + gamma, 1e-6)) <= TOLERANCE[F32]
    out, *_ = torch_npu.npu_add_rms_norm(x.npu().requires_grad_(), residual.npu(), gamma.npu())
    with pytest.raises(RuntimeError, match="not implemented"):
        out.sum().backward()
