"""npu_fused_rope: what it calls, angles of any size, and what it leaves to the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from hf_kernel_patch.ops.rope import reference
from npusim import calls, reset_calls
from tests.npu.device import drawn, function_of, kernel_of, rotary, used
from tests.support.ops import cases_rope
from tests.support.ops.checks import BF16, F16, F32
from tests.support.tiny import error


@pytest.mark.parametrize("grad", [False, True])
def test_rope_turns_attentions_q_and_k_without_a_copy(grad: bool) -> None:
    q, k = drawn(2, 9, 4, 64, grad=grad), drawn(2, 9, 2, 64, seed=1, grad=grad)
    cos, sin = rotary(q, heads=2)
    assert kernel_of("rope").why_fallback(q.transpose(1, 2), k.transpose(1, 2), cos, sin) is None

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
    assert kernel_of("rope").why_fallback(*arguments) is None
    case = cases_rope.case("llama")
    for ours, theirs in zip(
        function_of("rope")(*arguments),
        case.original(*(tree_map(lambda x: getattr(x, "cpu", lambda: x)(), arguments))),
        strict=True,
    ):
        assert error(ours.cpu(), theirs) <= 1e-6


def test_rope_of_a_negative_dimension_is_that_dimension() -> None:
    q, k = drawn(2, 4, 9, 64, grad=False), drawn(2, 2, 9, 64, seed=1, grad=False)
    cos, sin = rotary(q)
    assert kernel_of("rope").why_fallback(q, k, cos, sin, -3) is None
    for ours, theirs in zip(
        function_of("rope")(q, k, cos, sin, -3), function_of("rope")(q, k, cos, sin), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("q", "cos", "why"),
    [
        ((4, 9, 64), (1, 9, 64), "of the dimensions that cos"),
        ((1, 4, 9, 64), (9, 64), "batch and length"),  # as (B, S, heads, D)
        ((1, 4, 9, 64), (64,), "of the dimensions that cos"),
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
    refused = kernel_of("rope").why_fallback(drawn(*q), drawn(*q), angles, angles, 1, False)
    assert refused is not None and why in refused


@pytest.mark.parametrize("pairs", ["halves", "interleaved", "interleaved_to_halves"])
@pytest.mark.parametrize("angles", ["elements", "first_half", "pairs"])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rope_of_pairs_is_served(pairs: str, angles: str, one: bool, factor: float) -> None:
    q, k = drawn(2, 4, 9, 80), None if one else drawn(2, 2, 9, 80, seed=1)
    width = 32 if angles == "pairs" else 64
    cos, sin = (drawn(1, 9, width, seed=s, grad=False).sin() * factor for s in (2, 3))
    given = q, k, cos, sin, 1, False, pairs, angles, True
    assert kernel_of("rope").why_fallback(*given) is None
    reset_calls()
    found = [out for out in function_of("rope")(*given) if out is not None]
    torch.autograd.backward(found, [out.detach() for out in found])
    assert calls()["npu_rotary_mul"] == (2 if one else 4)
    here = [x for x in (q, k) if x is not None]
    wide = [x.detach().cpu().double().requires_grad_() for x in here]
    angle = (cos.cpu().double(), sin.cpu().double())
    truth = reference.rope(wide[0], None if one else wide[1], *angle, *given[4:])
    right = [out for out in truth if out is not None]
    torch.autograd.backward(right, [out.detach().cpu().double() for out in found])
    for ours, theirs in zip(found, right, strict=True):
        assert error(ours.detach().cpu(), theirs.detach()) < 2e-7
    for ours, theirs in zip(here, wide, strict=True):
        assert error(ours.grad.cpu(), theirs.grad) < 2e-7


def test_rope_of_packed_sequences_is_one_operator_each() -> None:
    q, k, _ = drawn(9, 3, 4, 64, grad=False).unbind(1)
    cos, sin = (drawn(9, 64, seed=s, grad=False).sin() for s in (2, 3))
    given = q, k, cos, sin, -2, True, "halves", "elements", True
    assert kernel_of("rope").why_fallback(*given) is None
    assert used(function_of("rope"), *given)["npu_rotary_mul"] == 2
    found = function_of("rope")(*given)
    wide = (x.cpu().double() for x in given[:4])
    for ours, theirs in zip(found, reference.rope(*wide, *given[4:]), strict=True):
        assert ours.shape == (9, 4, 64)
        assert error(ours.cpu(), theirs) < 2e-7


def test_rope_of_pairs_of_neighbours_beyond_the_operator_goes_back() -> None:
    q = drawn(2, 4, 9, 64, grad=False)
    cos, sin = (drawn(2, 9, 64, seed=s, grad=False).sin() for s in (2, 3))
    refused = kernel_of("rope").why_fallback(q, q, cos, sin, 1, False, "interleaved")
    assert refused is not None and "of all sequences" in refused
    many = drawn(500, 2, 9, 64, grad=False)
    refused = kernel_of("rope").why_fallback(many, many, cos[:1], sin[:1], 1, False, "interleaved")
    assert refused is not None and "of all sequences" in refused
    assert kernel_of("rope").why_fallback(many, many, cos[:1], sin[:1]) is None


@pytest.mark.parametrize("width", [64, 48])
@pytest.mark.parametrize("factor", [1.3, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_rope_of_scaled_angles_is_served_within_the_operators_range(
    dtype: torch.dtype, factor: float, width: int
) -> None:
    q, k = drawn(2, 4, 9, 64, dtype=dtype), drawn(2, 2, 9, 64, seed=1, dtype=dtype)
    cos, sin = (angle * factor for angle in rotary(q, width=width))
    assert kernel_of("rope").why_fallback(q, k, cos, sin) is None
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
        assert kernel_of("rope").why_fallback(q, q, cos, wrong) == "cos or sin is not finite"
        with pytest.raises(ValueError, match="not finite"):
            function_of("rope")(q, q, cos, wrong)
    monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: True)
    assert "while a graph is captured" in str(kernel_of("rope").why_fallback(q, q, cos, sin))
    monkeypatch.undo()
    assert kernel_of("rope").why_fallback(q, q, cos, sin) is None
    monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: True)
    assert kernel_of("rope").why_fallback(q, q, cos, sin) is None  # read before


def test_rope_with_angles_that_need_a_gradient_goes_back() -> None:
    q = drawn(1, 4, 9, 64)
    cos, sin = rotary(q)
    why = kernel_of("rope").why_fallback(q, q, cos.requires_grad_(), sin, 1, False)
    assert why == "cos or sin needs a gradient"
