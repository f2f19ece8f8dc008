"""rms_norm in Triton without a weight and by groups, and what no kernel of norms takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.rms_norm import reference
from tests.ops.triton_norms import ADD, EPS, NORM, RMS_NORM, operands, outcome
from tests.support.ops.checks import F64, draw
from tests.support.ops.interpreted import DEVICE, MARKS
from tests.support.tiny import error

pytestmark = MARKS


@pytest.mark.parametrize("layout", ["contiguous", "heads", "half", "sliced", "expanded"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_without_a_weight(layout: str, group_size: int | None) -> None:
    x = draw((2, 3, 4, 24), layout=layout, device=DEVICE)
    wide = x.detach().double().requires_grad_()
    given = EPS, 0.0, True, None, group_size
    found = outcome(lambda x: RMS_NORM(x, None, *given), [x], layout)
    truth = outcome(lambda x: reference.rms_norm(x, None, *given, dtype=F64), [wide], layout)
    assert max(error(a.detach(), b.detach()) for a, b in zip(found, truth, strict=True)) < 2e-6


@pytest.mark.parametrize("group_size", [None, 8])
def test_gradients_of_gradients_without_a_weight(group_size: int | None) -> None:
    x = draw((5, 24), F64, device=DEVICE)
    given = EPS, 0.0, True, None, group_size

    def second(function: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
        total = (function(x, None, *given, **options) ** 3).sum()
        (first,) = torch.autograd.grad(total, x, create_graph=True)
        (found,) = torch.autograd.grad((first * first).sum(), x)
        return found

    found = second(RMS_NORM, x.detach().float().requires_grad_())
    assert error(found, second(reference.rms_norm, x, dtype=F64)) < 2e-6


def test_rows_in_groups_too_wide_for_registers_and_gates_without_a_weight() -> None:
    x, gate, weight = operands("rms_norm_in_groups", (3, 2 * 8200))
    given = EPS, 0.0, True, gate, 8200, False
    for one in (weight, None):
        assert error(RMS_NORM(x, one, *given), reference.rms_norm(x, one, *given)) < 1e-6


def test_refuses_what_no_kernel_can_take() -> None:
    x, gate, weight = operands("rms_norm_in_groups")
    given = weight, EPS, 0.0, True
    assert NORM.why_fallback(x, None, EPS) is None
    assert NORM.why_fallback(x, *given, gate, 8) is None
    for group_size in (7, 0, -8, 48):
        assert "whole groups" in str(NORM.why_fallback(x, *given, None, group_size))
    assert "another shape" in str(NORM.why_fallback(x, *given, gate[:1], 8, False))
    for kind in (torch.int64, torch.int32, torch.bool):
        assert "floating point" in str(NORM.why_fallback(x.detach().to(kind), weight, EPS))
        whole = x.detach().to(kind)
        assert "floating point" in str(ADD.why_fallback(whole, whole, weight, EPS))
        assert "floating point" in str(ADD.why_fallback(x, whole, weight, EPS))
    point = torch.tensor(2.0, device=DEVICE)
    assert "weight" in str(NORM.why_fallback(point, point, EPS))
    assert "weight" in str(NORM.why_fallback(point, None, EPS))
    assert "weight" in str(ADD.why_fallback(point, point, point, EPS))
    wide = torch.empty(1, 65537, device="meta")
    assert "65536" in str(NORM.why_fallback(wide, wide[0], EPS))
    assert "65536" in str(ADD.why_fallback(wide, wide, wide[0], EPS))


@pytest.mark.parametrize("shape", [(0, 24), (3, 0)])
@pytest.mark.parametrize("weighted", [True, False])
def test_no_elements(shape: tuple[int, ...], weighted: bool) -> None:
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    weight = torch.ones(shape[-1:], device=DEVICE, requires_grad=True) if weighted else None
    RMS_NORM(x, weight, EPS).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    if weight is not None:
        assert weight.grad is not None
        assert not weight.grad.any()
