"""What moe keeps for its backward goes through save_for_backward, where checkpoints see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hf_kernel_patch.ops.moe import TorchFusedMoE
from tests.support.moe_kernels import KERNELS, registered
from tests.support.ops import cases_moe, cases_moe_gated
from tests.support.ops.checks import backends, device_of

ROUTES = ("several experts", "experts without tokens", "experts of another rank")
CASES = [
    cases_moe.case(route, listed=listed, sizes=cases_moe.EVEN)
    for route in ROUTES
    for listed in (False, True)
]


def leaves_of(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    return [x for x in tree_leaves(arguments) if getattr(x, "requires_grad", False)]


def nodes_of(out: torch.Tensor) -> list[Any]:
    """The autograd functions of ours that a tensor is computed by."""
    found, todo = [], [out.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in found:
            continue
        found.append(node)
        todo += [following for following, _ in node.next_functions]
    return [node for node in found if hasattr(node, "__dict__")]


def check(op: Any, case: Any, device: str) -> None:
    """Nothing but what is packed, and the gradients of what a checkpoint has computed again."""
    arguments, _ = case.inputs(device)
    out = op(*arguments)
    kept = [value for node in nodes_of(out) for value in tree_leaves(vars(node))]
    assert not [value for value in kept if isinstance(value, torch.Tensor)]
    upstream = torch.randn_like(out)
    wanted = torch.autograd.grad(out, leaves_of(arguments), upstream, allow_unused=True)
    again, _ = case.inputs(device)
    out = checkpoint(op, *again, use_reentrant=False)
    found = torch.autograd.grad(out, leaves_of(again), upstream, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("biased", [False, True])
def test_nothing_is_kept_elsewhere_by_experts_with_a_gate_of_their_own(biased: bool) -> None:
    check(
        TorchFusedMoE.load(), cases_moe_gated.case("experts of another rank", biased=biased), "cpu"
    )


@pytest.mark.parametrize(("kernel", "case"), backends(CASES))
def test_nothing_is_kept_elsewhere(kernel: Any, case: Any) -> None:
    device = device_of(kernel)
    check(kernel.load(), case, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs on the GPU, above")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_kept_elsewhere_by_the_interpreted_kernel(case: Any) -> None:
    from hf_kernel_patch import registry

    with registered(KERNELS[1]):
        check(registry.kernels()[KERNELS[1]].load(), case, "cpu")
