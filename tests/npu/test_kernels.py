"""The npu kernels against float64 on the CPU, and which of torch_npu's operators they call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from npusim import calls, reset_calls
from tests.npu.device import drawn, function_of, kernel_of, rotary, used
from tests.support.ops import (
    cases_add_rms_norm,
    cases_moe,
    cases_rms_norm,
    cases_rope,
    cases_swiglu,
)
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    Case,
    check_backend,
    check_double_backward,
    check_saves_nothing,
)
from tests.support.tiny import error

TABLES = (cases_rms_norm, cases_add_rms_norm, cases_rope, cases_swiglu, cases_moe)


@pytest.mark.parametrize(
    "case", [case for table in TABLES for case in table.CASES], ids=lambda case: f"{case.op}-{case}"
)
def test_kernel_is_no_further_from_the_truth_than_hugging_face(case: Case) -> None:
    check_backend(kernel_of(case.op), case)


PLAIN = [
    case
    for table in TABLES
    for case in table.PLAIN
    if not kernel_of(case.op).why_fallback(*case.inputs("cpu")[0])
]


@pytest.mark.parametrize("check", [check_double_backward, check_saves_nothing])
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: f"{case.op}-{case}")
def test_kernel_holds(check: Callable[..., None], case: Case) -> None:
    check(kernel_of(case.op), case)


# rms_norm


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F32, F16)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_one_operator_forward_and_one_backward(dtypes: Any, offset: float) -> None:
    x, weight = drawn(2, 5, 64, dtype=dtypes[0]), drawn(64, dtype=dtypes[1])
    out = function_of("rms_norm")(x, weight, 1e-6, offset, not offset)
    reset_calls()
    out = function_of("rms_norm")(x, weight, 1e-6, offset, not offset)
    out.backward(torch.ones_like(out))
    found = calls()
    assert found["npu_rms_norm"] == found["npu_rms_norm_backward"] == 1
    assert not {"rsqrt", "pow.Tensor_Scalar", "mean.dim"} & found.keys()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("grads", [(True, True, True), (False, True, False), (False, False, True)])
def test_gated_rms_norm_has_no_eager_norm_in_it(
    dtype: torch.dtype, grads: tuple[bool, bool, bool]
) -> None:
    x, gate = (drawn(5, 64, dtype=dtype, seed=i, grad=grads[i]) for i in range(2))
    weight = drawn(64, dtype=dtype, grad=grads[2])
    reset_calls()
    out = function_of("rms_norm")(x, weight, 1e-6, 0.0, True, gate)
    out.backward(torch.ones_like(out))
    found = calls()
    assert found["npu_rms_norm"] == 1 + grads[1]  # the gate's gradient needs the norm again
    assert found.get("npu_rms_norm_backward", 0) == (grads[0] or grads[2])
    assert not {"rsqrt", "pow.Tensor_Scalar", "mean.dim"} & found.keys()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_add_rms_norm_is_one_operator_forward_and_one_backward(dtype: torch.dtype) -> None:
    x, residual, weight = drawn(5, 64, dtype=dtype), drawn(5, 64, dtype=dtype, seed=1), drawn(64)
    weight = weight.detach().to(dtype).requires_grad_()
    reset_calls()
    total, normed = function_of("add_rms_norm")(x, residual, weight, 1e-6)
    assert calls() == {"npu_add_rms_norm": 1}
    torch.autograd.backward((total, normed), (total.detach(), normed.detach()))
    assert calls()["npu_rms_norm_backward"] == 1


@pytest.mark.parametrize(
    ("x", "residual", "weight", "why"),
    [
        ((2, 64), (1, 64), (64,), "the residual differ in shape"),
        ((64,), (64,), (64,), "2 to 8"),
        ((2, 64), (2, 64), (1,), "the weight"),
    ],
)
def test_add_rms_norm_that_the_operator_does_not_take_goes_back(
    x: Any, residual: Any, weight: Any, why: str
) -> None:
    refused = kernel_of("add_rms_norm").why_fallback(
        drawn(*x), drawn(*residual), drawn(*weight), 1e-6
    )
    assert refused is not None and why in refused


def test_gemmas_weight_is_not_rounded_when_one_is_added() -> None:
    x = drawn(4, 64, dtype=BF16, grad=False)
    weight = torch.full((64,), 2.0**-10, device="npu", dtype=BF16)
    plain = function_of("rms_norm")(x, torch.ones_like(weight), 1e-6)
    shifted = function_of("rms_norm")(x.float(), weight.float(), 1e-6, 1.0, False)
    assert torch.equal(function_of("rms_norm")(x, weight, 1e-6, 1.0, False), shifted.bfloat16())
    assert not torch.equal(shifted.bfloat16(), plain)


@pytest.mark.parametrize(
    ("x", "weight", "why"),
    [((64,), (64,), "2 to 8"), ((0, 64), (64,), "2 to 8"), ((2, 64), (1,), "the weight")],
)
def test_rms_norm_that_the_operator_does_not_take_goes_back(x: Any, weight: Any, why: str) -> None:
    refused = kernel_of("rms_norm").why_fallback(drawn(*x), drawn(*weight), 1e-6, 0.0, True)
    assert refused is not None and why in refused


# swiglu


@pytest.mark.parametrize("grad", [False, True])
def test_swiglu_of_the_halves_of_a_tensor_copies_nothing(grad: bool) -> None:
    whole = drawn(3, 5, 64, grad=grad)
    gate, up = whole.chunk(2, dim=-1)
    found = used(function_of("swiglu"), gate, up)
    assert found == {"npu_swiglu": 1}


def test_swiglu_of_two_tensors_is_one_operator_each_way_after_one_copy() -> None:
    gate, up = drawn(3, 5, 32), drawn(3, 5, 32, seed=1)
    reset_calls()
    out = function_of("swiglu")(gate, up)
    assert calls() == {"cat": 1, "npu_swiglu": 1}
    out.backward(torch.ones_like(out))
    found = calls()
    assert found["npu_swiglu_backward"] == 1
    assert found["cat"] == 1


def test_swiglu_of_halves_gives_their_tensor_its_gradient() -> None:
    whole, same = drawn(3, 64), drawn(3, 64)
    out = function_of("swiglu")(*whole.chunk(2, dim=-1))
    grad = drawn(3, 32, seed=3, grad=False)
    out.backward(grad)
    copies = [half.clone() for half in same.chunk(2, dim=-1)]
    function_of("swiglu")(*copies).backward(grad)
    assert whole.grad is not None and same.grad is not None
    assert torch.equal(whole.grad, same.grad)


def test_swiglu_takes_a_gradient_that_is_not_contiguous() -> None:
    gate, up = drawn(3, 32), drawn(3, 32, seed=1)
    function_of("swiglu")(gate, up).sum().backward()
    expected = torch.autograd.grad(torch.nn.functional.silu(gate).mul(up).sum(), gate)[0]
    assert gate.grad is not None and error(gate.grad.cpu(), expected.cpu()) <= 1e-6


def test_swiglu_tells_halves_from_other_parts_of_one_tensor() -> None:
    whole = drawn(3, 96, grad=False)
    first, second, third = whole.chunk(3, dim=-1)
    rows = drawn(4, 32, grad=False)
    left, right = drawn(3, 64, grad=False).chunk(2, dim=-1)
    pairs = [(first, second), (second, third), (rows[:3], rows[1:]), (right, left), (left, left)]
    for gate, up in pairs:
        out = function_of("swiglu")(gate, up)
        assert torch.equal(out, function_of("swiglu")(gate.clone(), up.clone()))


@pytest.mark.parametrize(
    ("gate", "activation", "why"),
    [
        ((3, 32), "gelu_tanh", "silu, not gelu_tanh"),
        ((0, 32), "silu", "1 to 8"),
        ((3, 16), "silu", "dtype or shape"),
    ],
)
def test_swiglu_that_the_operator_does_not_take_goes_back(
    gate: Any, activation: str, why: str
) -> None:
    up = drawn(*gate) if activation != "silu" or why != "dtype or shape" else drawn(3, 32)
    refused = kernel_of("swiglu").why_fallback(drawn(*gate), up, activation)
    assert refused is not None and why in refused


# all but moe, whose products are in the dtype that autocast asks for


@pytest.mark.parametrize("op", ["rms_norm", "gated rms_norm", "add_rms_norm", "rope", "swiglu"])
def test_autocast_changes_neither_result_nor_dtype(op: str) -> None:
    arguments: tuple[Any, ...]
    if op.endswith("rms_norm"):
        x, weight = drawn(3, 64, dtype=BF16, grad=False), drawn(64, grad=False)
        arguments = x, weight, 1e-6
        if op == "gated rms_norm":
            arguments = *arguments, 0.0, True, x + 1
        elif op == "add_rms_norm":
            arguments = x, x + 1, weight.bfloat16(), 1e-6
    elif op == "rope":
        q = drawn(1, 4, 9, 64, dtype=BF16, grad=False)
        arguments = q, q, *(angles.float() for angles in rotary(q))
    else:
        arguments = drawn(3, 64, grad=False), drawn(3, 64, seed=1, grad=False)
    function = function_of(op.removeprefix("gated "))
    plain = function(*arguments)
    with torch.autocast("npu", dtype=BF16):
        inside = function(*arguments)
    pairs = zip(plain, inside, strict=True) if isinstance(plain, tuple) else [(plain, inside)]
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in pairs)
