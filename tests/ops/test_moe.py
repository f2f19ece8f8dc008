"""moe: lists and stacks, weights of unlike dtypes, what frozen tensors cost, transformers 4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.moe import TorchFusedMoE, reference
from tests.support.ops.cases_moe import (
    EVEN,
    FROZEN,
    PLAIN,
    as_list,
    case,
)
from tests.support.ops.checks import (
    Case,
    backends,
    device_of,
    draw,
)
from tests.support.tiny import ARCHITECTURES, TRANSFORMERS_5, error, modelling, tiny_config


@pytest.mark.parametrize(("kernel", "case"), backends([case("experts without tokens", sizes=EVEN)]))
def test_lists_and_stacks_give_the_same_and_unused_list_experts_get_no_gradient(
    kernel: Any, case: Case
) -> None:
    (hidden, index, weights, gate_up, down, activation), _ = case.inputs(device_of(kernel))
    pairs, downs = as_list(gate_up, down)
    stacked = kernel.load()(hidden, index, weights, gate_up, down, activation)
    listed = kernel.load()(hidden, index, weights, pairs, downs, activation)
    assert error(listed.detach(), stacked.detach()) <= 1e-6
    (stacked.sum() + listed.sum()).backward()
    for expert, (gate, up) in enumerate(pairs):
        if expert not in index:
            assert gate.grad is up.grad is downs[expert].grad is None
            assert not gate_up.grad[expert].any()
            continue
        assert error(torch.cat((gate.grad, up.grad)), gate_up.grad[expert]) <= 1e-6
        assert error(downs[expert].grad, down.grad[expert]) <= 1e-6


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_any_weight_of_another_dtype_is_refused(part: str, listed: bool) -> None:
    (*routed, gate_up, down, activation), _ = case("several experts", listed=listed).inputs("cpu")
    assert TorchFusedMoE.why_fallback(*routed, gate_up, down, activation) is None
    if part == "gate_up":
        gate_up = (
            [*gate_up[:-1], (gate_up[-1][0], gate_up[-1][1].half())] if listed else gate_up.half()
        )
    else:
        down = [*down[:-1], down[-1].half()] if listed else down.half()
    assert "differ in dtype" in str(TorchFusedMoE.why_fallback(*routed, gate_up, down, activation))


def grouped_flop(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Of (rows, K) by (E, K, N), or of (M, rows) by (rows, N)."""
    return 2 * a[0] * a[1] * b[-1]


@pytest.mark.parametrize(("kernel", "plain"), backends(PLAIN))
@pytest.mark.parametrize(
    ("frozen", "grads", "first", "second"), FROZEN, ids=[row[0] for row in FROZEN]
)
def test_frozen_tensors_cost_no_product(
    kernel: Any, plain: Case, frozen: str, grads: Any, first: int, second: int
) -> None:
    # At import it would bring triton, before the tests of Triton kernels choose its interpreter.
    from torch.utils.flop_counter import FlopCounterMode, addmm_flop

    counted = {torch.ops.aten.addmm_: addmm_flop, torch.ops.aten._grouped_mm: grouped_flop}
    listed = "list" in str(plain)
    wanted = case("several experts", listed=listed, sizes=EVEN, grads=grads)
    arguments, _ = wanted.inputs(device_of(kernel))
    rows, (size, width) = arguments[1].numel(), EVEN
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        kernel.load()(*arguments).sum().backward()
    combine = 2 * rows * size
    products = rows * size * width * 2 * (2 * first + second)
    assert products <= counter.get_total_flops() <= products + combine


@pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 has no list of experts")
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n in ("qwen3_moe", "mixtral")])
def test_reference_is_what_the_block_of_transformers_4_computes(
    name: str, norm_topk_prob: bool
) -> None:
    config = tiny_config(name, norm_topk_prob=norm_topk_prob)
    block_class = "Qwen3MoeSparseMoeBlock" if name == "qwen3_moe" else "MixtralSparseMoeBlock"
    torch.manual_seed(0)
    block = getattr(modelling(name), block_class)(config)
    tokens = draw((1, 7, config.hidden_size))
    out, logits = block(tokens)
    weights, index = F.softmax(logits, dim=1).topk(block.top_k, dim=-1)
    if norm_topk_prob or name == "mixtral":
        weights = weights / weights.sum(-1, keepdim=True)
    names = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    experts = [[getattr(expert, name).weight for name in names] for expert in block.experts]
    pairs, downs = [(gate, up) for gate, up, _ in experts], [down for *_, down in experts]
    same = reference.moe(tokens[0], index, weights, pairs, downs)
    assert error(same.detach(), out[0].detach()) <= 1e-6
    parameters = [tokens, *block.parameters()]
    upstream = draw(tuple(out.shape), seed=9, grad=False)
    theirs = torch.autograd.grad(out, parameters, upstream, allow_unused=True, retain_graph=True)
    ours = torch.autograd.grad(same, parameters, upstream[0], allow_unused=True)
    for found, wanted in zip(ours, theirs, strict=True):
        assert (found is None) == (wanted is None)  # of an expert that no token chose
        assert found is None or error(found, wanted) <= 1e-6
