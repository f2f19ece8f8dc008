"""Every row of every table, on the installed transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch.patching.lookup import locate
from tests.models.exceptions import NOT_IN_FLOAT64, UNUSED
from tests.support.tiny import (
    ARCHITECTURES,
    ROWS,
    TRANSFORMERS_5,
    error,
    largest_error,
    layer_ops_of,
    modelling,
    ops_of,
    outputs_and_gradients,
    tiny_model,
)

IDS = [f"{name}-{spec.qualname}" for name, spec in ROWS]


@pytest.mark.parametrize(("name", "spec"), ROWS, ids=IDS)
def test_row_is_replaced_inside_and_the_same_object_after(name: str, spec: Any) -> None:
    modelling(name)
    _, _, before = locate(spec)
    with hf_kernel_patch.patched(ops_of(name), models=name, strict=True):
        _, _, inside = locate(spec)
        assert inside is not before
    _, _, after = locate(spec)
    assert after is before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_outputs_and_gradients_agree(name: str) -> None:
    model = tiny_model(name)
    eager = outputs_and_gradients(model)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True) as report:
        inside = outputs_and_gradients(model)
        assert all(not row.fallbacks for row in report)
        served = {row.op for row in report if row.served}
        # Where attention and layers are whole, no norm of theirs and no rotation is left alone.
        assert served >= {*layer_ops_of(name)} - {"rope", *UNUSED.get(name, ())}
    assert largest_error(inside, eager) < 3e-6
    assert largest_error(outputs_and_gradients(model), eager) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision_is_no_further_from_the_truth_than_eager(
    name: str, dtype: torch.dtype
) -> None:
    model = tiny_model(name, dtype)
    eager = outputs_and_gradients(model)
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True):
        inside = outputs_and_gradients(model)
    model.config._experts_implementation = "eager"  # the grouped products take no float64
    # In transformers 4 these blocks add what they weighted in float32 to what they are given.
    wide = torch.float32 if name in NOT_IN_FLOAT64 and not TRANSFORMERS_5 else torch.float64
    truth = outputs_and_gradients(model.to(wide))
    assert error(inside["logits"], truth["logits"]) <= 1.1 * error(eager["logits"], truth["logits"])
    # The linear attention of older versions has gradients in float16 that are NaN.
    finite = [key for key in truth if eager[key].isfinite().all()]
    assert len(finite) > 10
    eager_errors = [error(eager[key], truth[key]) for key in finite]
    inside_errors = [error(inside[key], truth[key]) for key in finite]
    assert sum(inside_errors) <= 1.1 * sum(eager_errors)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if "linear_cross_entropy" in ops_of(n)])
def test_loss_without_logits_agrees(name: str) -> None:
    model = tiny_model(name).train()
    eager = outputs_and_gradients(model)
    with hf_kernel_patch.patched("linear_cross_entropy", models=name, strict=True):
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
