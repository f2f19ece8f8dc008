"""The npu kernels against float64 on the CPU, and which of torch_npu's operators they call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from hf_kernel_patch.ops.rope import reference
from tests.npu.device import drawn, function_of, kernel_of, used
from tests.npusim import calls, reset_calls
from tests.ops import test_add_rms_norm, test_moe, test_rms_norm, test_rope, test_swiglu
from tests.ops.checks import (
    BF16,
    F16,
    F32,
    Case,
    check_backend,
    check_double_backward,
    check_saves_nothing,
)
from tests.tiny import error

TABLES = (test_rms_norm, test_add_rms_norm, test_rope, test_swiglu, test_moe)


@pytest.mark.parametrize(
    "case", [case for table in TABLES for case in table.CASES], ids=lambda case: f"{case.op}-{case}"
)
def test_kernel_is_no_further_from_the_truth_than_hugging_face(case: Case) -> None:
    check_backend(kernel_of(case.op), case)


PLAIN = [
    case
    for table in TABLES
    for case in table.PLAIN
    if not kernel_of(case.op).refuse(*case.inputs("cpu")[0])
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
    refused = kernel_of("add_rms_norm").refuse(drawn(*x), drawn(*residual), drawn(*weight), 1e-6)
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
    refused = kernel_of("rms_norm").refuse(drawn(*x), drawn(*weight), 1e-6, 0.0, True)
    assert refused is not None and why in refused


# rope


def rotary(
    q: torch.Tensor, batch: int = 1, width: int = 64, heads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = drawn(batch, q.shape[3 - heads], width // 2, seed=5, grad=False).float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(q.dtype), angles.sin().to(q.dtype)


@pytest.mark.parametrize("grad", [False, True])
def test_rope_turns_attentions_q_and_k_without_a_copy(grad: bool) -> None:
    q, k = drawn(2, 9, 4, 64, grad=grad), drawn(2, 9, 2, 64, seed=1, grad=grad)
    cos, sin = rotary(q, heads=2)
    assert kernel_of("rope").refuse(q.transpose(1, 2), k.transpose(1, 2), cos, sin) is None

    def step() -> None:
        turned, other = function_of("rope")(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        assert turned.stride() == q.transpose(1, 2).stride()
        if grad:
            torch.autograd.backward((turned, other), (turned.detach(), other.detach()))

    found = used(step)
    assert found.pop("npu_rotary_mul") == (4 if grad else 2)
    assert found.keys() <= {"roll", "neg"}


def test_rope_of_one_token_and_many_sequences_is_served() -> None:
    q, k = drawn(9, 1, 8, 64, grad=False), drawn(9, 1, 2, 64, seed=1, grad=False)
    cos, sin = rotary(q, batch=9, heads=2)
    arguments = q.transpose(1, 2), k.transpose(1, 2), cos, sin, 1, False
    assert kernel_of("rope").refuse(*arguments) is None
    case = test_rope.case("llama")
    for ours, theirs in zip(
        function_of("rope")(*arguments),
        case.original(*(tree_map(lambda x: getattr(x, "cpu", lambda: x)(), arguments))),
        strict=True,
    ):
        assert error(ours.cpu(), theirs) <= 1e-6


def test_rope_of_a_negative_dimension_is_that_dimension() -> None:
    q, k = drawn(2, 4, 9, 64, grad=False), drawn(2, 2, 9, 64, seed=1, grad=False)
    cos, sin = rotary(q)
    assert kernel_of("rope").refuse(q, k, cos, sin, -3) is None
    for ours, theirs in zip(
        function_of("rope")(q, k, cos, sin, -3), function_of("rope")(q, k, cos, sin), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("q", "cos", "why"),
    [
        ((4, 9, 64), (1, 9, 64), "four dimensions"),
        ((1, 4, 9, 64), (9, 64), "four dimensions"),
        ((1, 4, 9, 900), (1, 9, 896), "under 896"),
        ((1, 1000, 2, 16), (1, 2, 16), "under 1000"),
        ((1000, 1, 2, 16), (1, 2, 16), "under 1000"),
        ((2, 4, 9, 15), (1, 9, 15), "odd"),
        ((2, 4, 9, 16), (1, 9, 32), "wider"),
        ((2, 4, 9, 16), (1, 1, 16), "every token"),
        ((2, 4, 0, 16), (1, 0, 16), "nothing to rotate"),
    ],
)
def test_rope_that_the_operator_does_not_take_goes_back(q: Any, cos: Any, why: str) -> None:
    angles = torch.ones(cos, device="npu")
    refused = kernel_of("rope").refuse(drawn(*q), drawn(*q), angles, angles, 1, False)
    assert refused is not None and why in refused


@pytest.mark.parametrize("width", [64, 48])
@pytest.mark.parametrize("factor", [1.3, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_rope_of_scaled_angles_is_served_within_the_operators_range(
    dtype: torch.dtype, factor: float, width: int
) -> None:
    q, k = drawn(2, 4, 9, 64, dtype=dtype), drawn(2, 2, 9, 64, seed=1, dtype=dtype)
    cos, sin = (angle * factor for angle in rotary(q, width=width))
    assert kernel_of("rope").refuse(q, k, cos, sin) is None
    reset_calls()
    outs = function_of("rope")(q, k, cos, sin)
    torch.autograd.backward(outs, [out.detach() for out in outs])
    assert calls()["npu_rotary_mul"] == 4
    here = [tensor.detach().cpu().requires_grad_() for tensor in (q, k)]
    wide = [tensor.detach().double().requires_grad_() for tensor in here]
    angles = cos.cpu(), sin.cpu()
    theirs = reference.rope(*here, *angles)
    truth = reference.rope(*wide, *(angle.double() for angle in angles))
    for found in (theirs, truth):
        grads = [out.detach().cpu().to(to.dtype) for out, to in zip(outs, found, strict=True)]
        torch.autograd.backward(found, grads)
    for ours, eager, right in (
        *zip(outs, theirs, truth, strict=True),
        *((a.grad, b.grad, c.grad) for a, b, c in zip((q, k), here, wide, strict=True)),
    ):
        assert ours.dtype == dtype
        assert error(ours.detach().cpu(), right.detach()) <= 1.1 * error(
            eager.detach(), right.detach()
        )


def test_rope_reads_the_range_of_angles_once_and_again_when_they_change() -> None:
    q = drawn(1, 4, 9, 64, grad=False)
    cos, sin = rotary(q)
    for _ in range(3):
        function_of("rope")(q, q, cos, sin)
    assert used(function_of("rope"), q, q, cos, sin) == {"npu_rotary_mul": 2}
    assert "amax" in used(function_of("rope"), q, q, cos, sin.clone())
    cos.mul_(1.5)
    assert "amax" in used(function_of("rope"), q, q, cos, sin)
    with torch.inference_mode():
        assert "amax" in used(function_of("rope"), q, q, *rotary(q))


def test_rope_of_angles_without_a_range_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    q = drawn(1, 4, 9, 64, grad=False)
    cos, sin = rotary(q)
    for value in (float("inf"), float("nan")):
        wrong = sin.clone()
        wrong[0, 0, 0] = value
        assert kernel_of("rope").refuse(q, q, cos, wrong) == "cos or sin is not finite"
        with pytest.raises(ValueError, match="not finite"):
            function_of("rope")(q, q, cos, wrong)
    monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: True)
    assert "while a graph is captured" in str(kernel_of("rope").refuse(q, q, cos, sin))
    monkeypatch.undo()
    assert kernel_of("rope").refuse(q, q, cos, sin) is None
    monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: True)
    assert kernel_of("rope").refuse(q, q, cos, sin) is None  # read before


def test_rope_with_angles_that_need_a_gradient_goes_back() -> None:
    q = drawn(1, 4, 9, 64)
    cos, sin = rotary(q)
    why = kernel_of("rope").refuse(q, q, cos.requires_grad_(), sin, 1, False)
    assert why == "cos or sin needs a gradient"


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
    refused = kernel_of("swiglu").refuse(drawn(*gate), up, activation)
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
