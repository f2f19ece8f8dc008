"""npu_fused_moe: which operators it calls, on what, and which experts it leaves to the original."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from hf_kernel_patch.ops.moe import reference
from npusim import calls, reset_calls
from tests.npu.device import drawn, function_of, kernel_of, used
from tests.support.ops.cases_moe import as_list
from tests.support.ops.checks import BF16, F16, F32
from tests.support.tiny import error


class Experts:
    """Arguments of moe with random routing: stacked, or a list of experts."""

    def __init__(
        self,
        experts: int,
        tokens: int = 12,
        slots: int = 2,
        width: int = 24,
        hidden: int = 16,
        dtype: torch.dtype = F32,
        index: Any = None,
        grad: bool = True,
    ):
        generator = torch.Generator().manual_seed(7)
        logits = torch.randn((tokens, experts), generator=generator)
        weights, chosen = logits.softmax(-1).topk(min(slots, experts), dim=-1)
        self.hidden = drawn(tokens, hidden, dtype=dtype, grad=grad)
        self.index = chosen.npu() if index is None else torch.tensor(index, device="npu")
        self.weights = weights.to("npu", dtype).requires_grad_(grad)
        self.gate_up = drawn(experts, 2 * width, hidden, dtype=dtype, seed=1, grad=grad)
        self.down = drawn(experts, hidden, width, dtype=dtype, seed=2, grad=grad)

    def stacked(self) -> tuple[Any, ...]:
        return self.hidden, self.index, self.weights, self.gate_up, self.down, "silu"

    def listed(self) -> tuple[Any, ...]:
        pairs, downs = as_list(self.gate_up, self.down)
        return self.hidden, self.index, self.weights, pairs, downs, "silu"


def truth_of(arguments: tuple[Any, ...]) -> torch.Tensor:
    """moe's reference on the CPU, in float32 on the same values."""
    move = tree_map(lambda x: x.detach().cpu() if isinstance(x, torch.Tensor) else x, arguments)
    return reference.moe(*move)


def fused_calls() -> dict[str, int]:
    return {name.lstrip("_"): n for name, n in calls().items() if name.lstrip("_")[:3] == "npu"}


@pytest.mark.parametrize("listed", [False, True])
def test_experts_are_fused_operators_forward_and_backward(listed: bool) -> None:
    experts = Experts(6, dtype=BF16)
    arguments = experts.listed() if listed else experts.stacked()
    reset_calls()
    out = function_of("moe")(*arguments)
    products = 3 if listed else 2
    fused = {
        "npu_moe_token_permute": 1,
        "npu_grouped_matmul": products,
        "npu_swiglu": 1,
        "npu_moe_token_unpermute": 1,
    }
    assert fused_calls() == fused
    assert not {"matmul", "mm", "index_add_", "one_hot", "nonzero"} & calls().keys()
    reset_calls()
    out.sum().backward()
    fused = {
        "npu_moe_token_unpermute_grad": 1,
        "npu_grouped_matmul": 2 * products,
        "npu_swiglu": 1,
        "npu_swiglu_backward": 1,
        "npu_moe_token_permute": 1,
        "npu_moe_token_permute_grad": 1,
    }
    assert fused_calls() == fused
    assert not {"matmul", "mm", "index_add_"} & calls().keys()


@pytest.mark.parametrize(
    ("frozen", "products"),
    [
        ((), 4),
        (("gate_up", "down"), 2),
        (("hidden",), 3),
        (("hidden", "gate_up"), 1),
        (("hidden", "gate_up", "down"), 0),
    ],
)
def test_frozen_tensors_cost_no_product(frozen: tuple[str, ...], products: int) -> None:
    experts = Experts(6, dtype=BF16)
    for name in frozen:
        getattr(experts, name).requires_grad_(False)
    out = function_of("moe")(*experts.stacked())
    reset_calls()
    out.sum().backward()
    assert calls().get("npu_grouped_matmul", 0) == products
    assert [getattr(experts, name).grad for name in frozen] == [None] * len(frozen)


@pytest.mark.parametrize("listed", [False, True])
def test_the_products_read_the_models_own_weights(
    listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_npu

    experts = Experts(6, dtype=BF16)
    arguments = experts.listed() if listed else experts.stacked()
    flat = [x for pair in arguments[3] for x in pair] + arguments[4] if listed else arguments[3:5]
    own = {weight.data_ptr() for weight in flat}
    read: set[int] = set()
    grouped_matmul = torch_npu.npu_grouped_matmul

    def watched(x: Any, weight: Any, **options: Any) -> Any:
        if options["group_type"] == 0:
            read.update(tensor.data_ptr() for tensor in weight)
        return grouped_matmul(x, weight, **options)

    monkeypatch.setattr(torch_npu, "npu_grouped_matmul", watched)
    function_of("moe")(*arguments).sum().backward()
    assert read and read <= own


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("count", [2, 128, 129, 130, 257])
def test_long_lists_of_experts_are_served_in_slices(count: int, dtype: torch.dtype) -> None:
    index = [[i % count, (i + 1) % count] for i in range(count)]
    experts = Experts(count, tokens=count, width=8, hidden=8, dtype=dtype, index=index)
    arguments = experts.listed()
    assert kernel_of("moe").why_fallback(*arguments) is None
    found = function_of("moe")(*arguments)
    assert error(found.detach().cpu(), truth_of(arguments)) <= (1e-6 if dtype is F32 else 2e-2)
    found.sum().backward()
    assert all(down.grad is not None and down.grad.any() for down in arguments[4])
    stacked = experts.stacked()
    function_of("moe")(*stacked).sum().backward()
    listed = torch.stack([torch.cat((gate.grad, up.grad)) for gate, up in arguments[3]])
    assert error(listed.float(), experts.gate_up.grad.float()) <= (1e-6 if dtype is F32 else 1e-2)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("listed", [False, True])
def test_one_expert_that_takes_every_token_is_served(listed: bool, dtype: torch.dtype) -> None:
    for count, index in ((1, [[0]] * 5), (4, [[2]] * 5)):
        experts = Experts(count, tokens=5, slots=1, dtype=dtype, index=index)
        experts.weights = experts.weights[:, :1].detach().requires_grad_()
        arguments = experts.listed() if listed else experts.stacked()
        found = function_of("moe")(*arguments)
        assert error(found.detach().cpu(), truth_of(arguments)) <= (1e-6 if dtype is F32 else 2e-2)
        found.sum().backward()
        weights = arguments[4] if listed else [arguments[4]]
        assert any(weight.grad is not None and weight.grad.any() for weight in weights)


@pytest.mark.parametrize("index", [None, [[0, 6], [6, 3], [6, 6], [5, 1]]])
@pytest.mark.parametrize("listed", [False, True])
def test_what_the_backward_needs_is_saved_where_checkpoints_see_it(
    listed: bool, index: Any
) -> None:
    experts = Experts(6, tokens=12 if index is None else 4, index=index)
    arguments = experts.listed() if listed else experts.stacked()
    out = function_of("moe")(*arguments)
    assert not any(isinstance(one, torch.Tensor) for one in tree_leaves(vars(out.grad_fn)))
    again = checkpoint(function_of("moe"), *arguments, use_reentrant=False)
    wanted = [one for one in tree_leaves(arguments) if getattr(one, "requires_grad", False)]
    found = [torch.autograd.grad(one.sum(), wanted, allow_unused=True) for one in (out, again)]
    for one, other in zip(*found, strict=True):
        assert one is other is None or torch.equal(one.cpu(), other.cpu())


@pytest.fixture(params=[False, True], ids=["alone", "with other ranks"])
def group(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether there is a process group, of this process alone."""
    if not request.param:
        yield False
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield True
    distributed.destroy_process_group()


@pytest.mark.parametrize("index", [[[0, 6], [6, 3], [6, 6], [5, 1]], [[6, 6]] * 4])
@pytest.mark.parametrize("listed", [False, True])
def test_experts_of_other_ranks_add_nothing(group: bool, listed: bool, index: Any) -> None:
    experts = Experts(6, tokens=4, index=index)
    arguments = experts.listed() if listed else experts.stacked()
    reset_calls()
    found = function_of("moe")(*arguments)
    assert error(found.detach().cpu(), truth_of(arguments)) <= 1e-6
    found.sum().backward()
    away = torch.tensor(index) == 6
    assert not experts.weights.grad.cpu()[away].any()
    assert experts.weights.grad.cpu()[~away].all()
    downs = arguments[4] if listed else arguments[4].grad
    for expert in range(6):
        grad = downs[expert].grad if listed else downs[expert]
        used_here = bool((torch.tensor(index) == expert).any())
        assert bool(grad is not None and grad.any()) == used_here


@pytest.mark.parametrize("listed", [False, True])
def test_pairs_of_other_ranks_are_not_computed(
    group: bool, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_npu

    experts = Experts(6, tokens=4, dtype=BF16, index=[[0, 6], [6, 3], [6, 6], [5, 1]])
    rows = set()
    grouped_matmul = torch_npu.npu_grouped_matmul

    def watched(x: Any, weight: Any, **options: Any) -> Any:
        rows.add(len(x[0]))
        return grouped_matmul(x, weight, **options)

    monkeypatch.setattr(torch_npu, "npu_grouped_matmul", watched)
    with torch.no_grad():
        function_of("moe")(*(experts.listed() if listed else experts.stacked()))
    assert rows == {4 if group or listed else 8}


def test_without_other_ranks_stacked_experts_never_wait_for_the_device() -> None:
    found = used(function_of("moe"), *Experts(6).stacked())
    assert not {"_local_scalar_dense", "nonzero", "bincount", "max", "item"} & found.keys()


def test_autocast_leaves_stacked_experts_in_their_dtype_as_transformers_does() -> None:
    for dtype, hidden in ((F32, F32), (BF16, F32), (BF16, BF16)):
        experts = Experts(6, tokens=40, dtype=dtype)
        experts.hidden = experts.hidden.detach().to(hidden).requires_grad_()
        with torch.autocast("npu", dtype=F16):
            assert kernel_of("moe").why_fallback(*experts.stacked()) is None
            found = function_of("moe")(*experts.stacked())
        assert found.dtype == hidden
        limit = 1e-6 if dtype is F32 else 2e-2
        assert error(found.detach().cpu(), truth_of(experts.stacked())) <= limit
        found.sum().backward()
        grads = experts.hidden.grad, experts.gate_up.grad, experts.down.grad
        assert [grad.dtype for grad in grads] == [hidden, dtype, dtype]


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_lists_of_experts_under_autocast_are_no_further_from_the_truth(dtype: torch.dtype) -> None:
    def moved(leaf: Any) -> Any:
        here = leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf
        wide = isinstance(leaf, torch.Tensor) and leaf.requires_grad
        return here.double().requires_grad_() if wide else here

    def run(function: Any, arguments: tuple[Any, ...], autocast: bool = True) -> list[torch.Tensor]:
        with torch.autocast("npu", dtype=dtype, enabled=autocast):
            out = function(*arguments)
        leaves = [leaf for leaf in tree_leaves(arguments) if getattr(leaf, "requires_grad", False)]
        grads = torch.autograd.grad(out.square().sum(), leaves)
        assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves, strict=True))
        return [out.detach().cpu(), *(grad.cpu() for grad in grads)]

    arguments = Experts(6, tokens=40).listed()
    assert kernel_of("moe").why_fallback(*arguments) is None
    reset_calls()
    found = run(function_of("moe"), arguments)
    assert calls()["npu_grouped_matmul"] == 9  # which lists in float32 do not have
    eager = run(reference.moe, arguments)  # its products are autocast's
    wide = functools.partial(reference.moe, dtype=torch.float64)
    truth = run(wide, tree_map(moved, arguments), autocast=False)
    assert found[0].dtype == F32
    for ours, theirs, right in zip(found, eager, truth, strict=True):
        assert error(ours, right) <= (1.1 + 5 / right.numel() ** 0.5) * error(theirs, right)


def test_experts_that_the_operators_do_not_take_go_back() -> None:
    def why(arguments: tuple[Any, ...], **changes: Any) -> str:
        names = ("hidden", "index", "weights", "gate_up", "down", "activation")
        changed = {**dict(zip(names, arguments, strict=True)), **changes}
        return str(kernel_of("moe").why_fallback(*changed.values()))

    plain = Experts(6).stacked()
    assert why(plain) == "None"
    assert why((plain[0], None, None, *Experts(6).listed()[3:])) == "None"
    assert "silu, not gelu_tanh" in why(plain, activation="gelu_tanh")
    assert "differ in dtype" in why(plain, hidden=plain[0].bfloat16())
    assert "no token" in why(plain, hidden=plain[0][:0], index=plain[1][:0])
    assert "not contiguous" in why(plain, gate_up=plain[3].mT.contiguous().mT)
    assert "on another device" in why(plain, down=plain[4].cpu())
    assert "512 experts a token" in why(plain, index=plain[1][:, :1].expand(-1, 513))
    wide = torch.empty(6, 65536, 1, device="npu")
    assert "under 65536" in why(plain, gate_up=wide)
    many = torch.empty(1025, 2, 1, device="npu")
    assert "1024 experts" in why(plain, gate_up=many, down=many.mT.contiguous())
