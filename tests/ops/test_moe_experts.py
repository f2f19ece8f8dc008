"""The type of the experts' weights: flat for autograd, and back, stacked or listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.moe.experts import Experts, flatten
from tests.support.ops.cases_moe import as_list

COUNT, HIDDEN, WIDTH = 3, 8, 5
GATE_UP = torch.arange(COUNT * 2 * WIDTH * HIDDEN).view(COUNT, 2 * WIDTH, HIDDEN).float()
DOWN = torch.arange(COUNT * HIDDEN * WIDTH).view(COUNT, HIDDEN, WIDTH).float()


def arguments(listed: bool) -> tuple[Any, Any]:
    return as_list(GATE_UP, DOWN) if listed else (GATE_UP, DOWN)


@pytest.mark.parametrize("listed", [False, True])
def test_the_flat_weights_are_the_same_experts(listed: bool) -> None:
    given = arguments(listed)
    experts = Experts(flatten(*given))
    assert (experts.listed, experts.count, experts.sizes) == (listed, COUNT, (HIDDEN, WIDTH))
    again = Experts.of(*experts.arguments)
    assert all(one is other for one, other in zip(experts.flat, again.flat, strict=True))
    *first, second = experts.products
    assert len(first) == (2 if listed else 1)
    assert torch.equal(torch.stack(list(second)), DOWN)
    gate_up = torch.cat([torch.stack(list(weights)) for weights in first], dim=1)
    assert torch.equal(gate_up, GATE_UP)


def test_two_experts_in_a_list_are_no_stacked_ones() -> None:
    pairs, downs = as_list(GATE_UP[:2], DOWN[:2])
    assert Experts.of(pairs, downs).listed


def test_listed_experts_get_their_part_of_the_gradients_where_used_and_needed() -> None:
    experts = Experts.of(*arguments(listed=True))
    needed = [True] * len(experts.flat)
    needed[1] = False  # the gate of the second expert
    used = [False, True, True]
    gradients = experts.split_gradients(GATE_UP, DOWN, needed, used)
    for i, (gradient, weight) in enumerate(zip(gradients, experts.flat, strict=True)):
        if i % COUNT == 0 or i == 1:
            assert gradient is None
        else:
            assert torch.equal(gradient, weight)
    assert not any(
        gradient is not None for gradient in experts.split_gradients(None, None, needed, used)
    )


@pytest.mark.parametrize(("listed", "last"), [(False, 1), (True, COUNT)])
def test_gate_up_and_down_are_asked_for_apart(listed: bool, last: int) -> None:
    experts = Experts.of(*arguments(listed))
    first = len(experts.flat) - last
    assert experts.any_needed([True] * first + [False] * last) == (True, False)
    assert experts.any_needed([False] * first + [True] * last) == (False, True)
