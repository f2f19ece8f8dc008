"""Every op's table of cases: the reference against Hugging Face, and every kernel against both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.ops import (
    cases_add_rms_norm,
    cases_linear_cross_entropy,
    cases_lora,
    cases_moe,
    cases_qk_norm_rope,
    cases_rms_norm,
    cases_rope,
    cases_swiglu,
)
from tests.support.ops.checks import (
    Case,
    backends,
    check_backend,
    check_double_backward,
    check_reference,
    check_same_bits,
    check_saves_nothing,
)

TABLES: tuple[Any, ...] = (
    cases_rms_norm,
    cases_add_rms_norm,
    cases_rope,
    cases_qk_norm_rope,
    cases_swiglu,
    cases_moe,
    cases_linear_cross_entropy,
    cases_lora,
)
CASES: list[Case] = [case for table in TABLES for case in table.CASES]
PLAIN: list[Case] = [case for table in TABLES for case in table.PLAIN]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case}")
def test_reference_is_what_hugging_face_computes(case: Case) -> None:
    check_reference(case)


@pytest.mark.parametrize(("kernel", "case"), backends(CASES))
def test_backend_is_no_further_from_the_truth_than_hugging_face(kernel: Any, case: Case) -> None:
    check_backend(kernel, case)


@pytest.mark.parametrize("check", [check_double_backward, check_saves_nothing, check_same_bits])
@pytest.mark.parametrize(("kernel", "case"), backends(PLAIN))
def test_backend_holds(check: Callable[..., None], kernel: Any, case: Case) -> None:
    check(kernel, case)
