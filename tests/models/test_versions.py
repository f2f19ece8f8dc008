"""What every version of transformers is asked, also those that the other tests do not run with."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch.cli.doctor import examine
from hf_kernel_patch.models import architectures
from tests.models.exceptions import NOT_IN_FLOAT64, UNUSED
from tests.support.tiny import (
    ARCHITECTURES,
    TRANSFORMERS_5,
    error,
    ops_of,
    outputs_and_gradients,
    tiny_model,
)

pytestmark = pytest.mark.versions


def test_every_row_that_should_be_there_is_there() -> None:
    rows = examine()["tables"]
    missing = {row["site"]: row["reason"] for row in rows if row["reason"] is not None}
    assert not missing
    # No row at all is what a table has whose rows are all for other versions.
    installed = {name for name, table in architectures().items() if has_module(table.module)}
    assert {row["architecture"] for row in rows} == installed


def has_module(name: str) -> bool:
    """Whether the installed transformers has the modelling module."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_training_step_with_every_op_of_the_table(name: str) -> None:
    model = tiny_model(name).train()
    eager = loss_and_gradients(model)
    hf_kernel_patch.count_calls()
    ops = ops_of(name)
    with hf_kernel_patch.patched(ops, models=name, backend="torch", strict=True) as report:
        inside = loss_and_gradients(model)
    assert {row.op for row in report if row.served} >= expected_to_serve(name)
    assert inside.keys() == eager.keys()
    assert error(inside["loss"], eager["loss"]) <= 1e-6
    far = {key: err for key in eager if (err := error(inside[key], eager[key])) > 1e-5}
    if far:
        # Where little is left of large terms, two right orders of adding up may be further apart.
        truth = loss_and_gradients(in_float64(model, name))
        allowed = {key: 2 * error(eager[key], truth[key]) for key in far}
        assert not {key: e for key in far if (e := error(inside[key], truth[key])) > allowed[key]}


def loss_and_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Loss and every gradient of one training step; the rows check the logits elsewhere."""
    found = outputs_and_gradients(model)
    found.pop("logits")
    return found


def expected_to_serve(name: str) -> set[str]:
    """The ops whose code the tiny model of an architecture runs."""
    ops = {*ops_of(name)} - {*UNUSED.get(name, ()), "decode_attention"}
    # Where an op takes the norms of queries and keys with their rotation, no rotation is left.
    return ops - {"rope"} if "qk_norm_rope" in ops else ops


def in_float64(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The model, from now on in float64 as far as transformers computes in it."""
    model.config._experts_implementation = "eager"  # the grouped products take no float64
    # In transformers 4 these blocks add what they weighted in float32 to what they are given.
    return model if name in NOT_IN_FLOAT64 and not TRANSFORMERS_5 else model.double()
