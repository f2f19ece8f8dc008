"""rms_norm by groups, without a weight and with other gates: which operators it calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from npusim import calls, reset_calls
from tests.npu.device import drawn, function_of, kernel_of
from tests.support.ops.checks import BF16, F32

EAGER = {"rsqrt", "pow.Tensor_Scalar", "mean.dim"}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("weighted", "gated", "extras"),
    [
        (False, False, ()),
        (False, False, (16,)),
        (True, False, (16,)),
        (True, False, (None, True, "silu", True)),
        (True, True, (16, False)),
        (True, True, (None, False)),
        (True, True, (None, True, "sigmoid")),
    ],
)
def test_the_norm_is_one_operator_each_way(
    dtype: torch.dtype, weighted: bool, gated: bool, extras: tuple[Any, ...]
) -> None:
    x = drawn(2, 5, 64, dtype=dtype)
    weight = drawn(64, dtype=F32) if weighted else None
    gate = drawn(2, 5, 64, dtype=dtype, seed=1) if gated else None
    given = x, weight, 1e-6, 0.0, True, gate, *extras
    assert kernel_of("rms_norm").why_fallback(*given) is None
    reset_calls()
    out = function_of("rms_norm")(*given)
    out.backward(torch.ones_like(out))
    found = calls()
    assert found["npu_rms_norm"] == found["npu_rms_norm_backward"] == 1
    assert not EAGER & found.keys()


def test_groups_are_a_dimension_more() -> None:
    x, weight = drawn(*(1,) * 7, 8), drawn(8)
    why_fallback = kernel_of("rms_norm").why_fallback
    assert why_fallback(x, weight, 1e-6) is None
    assert "dimensions" in str(why_fallback(x, weight, 1e-6, 0.0, True, None, 4))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_whole_numbers_go_back(dtype: torch.dtype) -> None:
    x, weight = drawn(2, 8), drawn(8)
    whole = x.detach().to(dtype)
    assert "floating point" in str(kernel_of("rms_norm").why_fallback(whole, weight, 1e-6))
    for pair in ((whole, x), (x, whole)):
        refused = kernel_of("add_rms_norm").why_fallback(*pair, weight, 1e-6)
        assert "floating point" in str(refused)
