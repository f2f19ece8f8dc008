"""Frameworks walk over an output in every step; the stand-in answers as the logits do."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from accelerate.utils.operations import recursively_apply
from torch.distributed.utils import _apply_to_tensors
from torch.nn.parallel.distributed import _find_tensors, _tree_flatten_with_rref

from tests.recognition.rules.head_loss.steps import walked


def looks(output: Any) -> list[Any]:
    """What each walker finds where the logits are."""
    seen: list[Any] = []
    recursively_apply(lambda one: seen.append(one) or one, output)  # type: ignore[func-returns-value]
    found = [next(one for one in seen if one.dim() == 3)]
    _apply_to_tensors(lambda one: found.append(one) or one, OrderedDict(output=output))  # type: ignore[func-returns-value, arg-type]
    return [
        *(one for one in found if one.dim() == 3),
        list(_find_tensors(output))[1],
        _tree_flatten_with_rref(output)[0][1],
    ]


def test_what_walkers_find_answers_as_the_original_s_logits(
    pair: tuple[Any, Any], made: list[bool]
) -> None:
    inside, eager = pair
    for one in looks(inside):
        assert isinstance(one, torch.Tensor)
        for name in ("requires_grad", "is_leaf", "shape", "dtype", "device", "_base"):
            assert getattr(one, name) == getattr(eager.logits, name), name
    assert made == []
    assert type(one.grad_fn) is type(eager.logits.grad_fn)  # for who asks himself
    assert made == [True]
    assert one.grad_fn is inside.logits.grad_fn


def test_hooks_that_a_walker_registers_are_run_by_the_real_logits(
    pair: tuple[Any, Any], made: list[bool]
) -> None:
    inside, eager = pair
    stand_in, seen = walked(inside)[1], []
    stand_in.register_hook(lambda grad: seen.append(grad.clone()))
    stand_in.register_hook(lambda grad: 2 * grad)
    stand_in.register_hook(lambda grad: None).remove()
    removed = stand_in.register_hook(lambda grad: 0 * grad)
    removed.remove()
    with pytest.raises(RuntimeError, match="doesn't require grad"):
        stand_in.detach().register_hook(lambda grad: grad)
    inside.loss.backward(retain_graph=True)
    assert (made, seen) == ([], [])
    inside.logits.register_hook(lambda grad: seen.append(grad.clone()))
    inside.logits.sum().backward()
    assert torch.equal(seen[0], torch.ones_like(eager.logits))
    assert torch.equal(seen[1], 2 * torch.ones_like(eager.logits))


def test_a_copy_that_waits_is_of_what_was_there_when_it_was_made(pair: tuple[Any, Any]) -> None:
    inside, eager = pair
    stand_in = walked(inside)[1]
    copy, wide, same = stand_in.clone(), stand_in.to(torch.float64), stand_in.detach()
    with torch.no_grad():
        without = stand_in.clone()
        inside.logits[..., 0] = 7
    assert torch.equal(copy + 0, eager.logits)
    assert torch.equal(wide + 0, eager.logits.double())
    assert (same[..., 0] == 7).all()
    assert (copy + 0).requires_grad
    assert not (without + 0).requires_grad
    assert not without.requires_grad
