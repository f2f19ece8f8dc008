"""moe: the reference and every backend against the experts of transformers 5 and the lists of 4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.func import functional_call
from torch.nn import functional as F

from hf_kernel_patch.ops.moe import TorchFusedMoE, reference
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    SHORT,
    Case,
    backends,
    device_of,
    draw,
)
from tests.support.tiny import ARCHITECTURES, TRANSFORMERS_5, error, modelling, tiny_config

EXPERTS = 5
#: Hidden size and width of an expert. Grouped products want rows of whole 16 bytes.
ODD, EVEN = (61, 37), (64, 48)
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}
KNOWS_SENTINEL = Version(transformers.__version__) >= Version("5.18")
#: name -> index (T, 2) of the experts; 5, their number, is another rank's.
ROUTES: dict[str, list[list[int]]] = {
    "several experts": [[0, 2], [2, 4], [4, 1], [1, 0], [3, 2], [0, 4], [2, 3]],
    "experts without tokens": [[4, 1], [1, 4]] * 4,
    "one expert takes all": [[3, 3]] * 7,
    "a token whose experts repeat": [[2, 2], [0, 1], [4, 4]] * 3,
    "one token": [[1, 3]],
    "no token": [],
    "experts of another rank": [[5, 1], [0, 5], [5, 5], [2, 3], [4, 5], [3, 5], [1, 0]],
    "all experts of another rank": [[5, 5], [5, 5]],
    "many tokens": [[i % 5, (i * i + 1) % 6] for i in range(150)],
    "one expert takes most": [[0, i % 6] for i in range(130)],
}
#: What gets a gradient: hidden, weights, gate_up, down.
ALL = (True, True, True, True)


def case(
    route: str,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    *,
    sizes: tuple[int, int] = ODD,
    listed: bool = False,
    activation: str = "silu",
    grads: tuple[bool, bool, bool, bool] = ALL,
    name: str = "",
    **drawn: Any,
) -> Case:
    """dtypes of hidden and of the routing weights; ``drawn`` is about hidden: layout, poison."""
    index = torch.tensor(ROUTES[route], dtype=torch.long).reshape(-1, 2)
    dtype = dtypes[0]
    size, width = sizes

    def inputs(device: str) -> Any:
        hidden = draw((len(index), size), dtype, grad=grads[0], device=device, **drawn)
        logits = draw((len(index), 2), seed=1, grad=False).softmax(-1)
        weights = logits.to(device, dtypes[1]).requires_grad_(grads[1])
        parts = (
            draw(shape, dtype, seed=seed, scale=shape[-1] ** -0.5, grad=grad, device=device)
            for seed, shape, grad in (
                (2, (EXPERTS, 2 * width, size), grads[2]),
                (3, (EXPERTS, size, width), grads[3]),
            )
        )
        gate_up, down = as_list(*parts) if listed else parts
        return (hidden, index.to(device), weights, gate_up, down, activation), {}

    kinds = "-".join(SHORT[one] for one in dtypes)
    layout = f"{'list' if listed else 'stacked'}-{'x'.join(map(str, sizes))}"
    shown = f"{name or route}-{layout}-{activation}-{kinds}"
    return Case(shown, "moe", inputs, original)


def original(
    hidden: Any, index: Any, weights: Any, gate_up: Any, down: Any, activation: str
) -> torch.Tensor:
    """Qwen3-MoE's stacked experts, in the loop that is their own code.

    For lists, and where the installed transformers has no stacked experts or none that know of
    other ranks', the reference in hidden's dtype: what the blocks of transformers 4 compute, as
    another test shows.
    """
    elsewhere = bool((index == EXPERTS).any())
    if isinstance(down, list) or not TRANSFORMERS_5 or (elsewhere and not KNOWS_SENTINEL):
        options = {"dtype": hidden.dtype}
        return reference.moe(hidden, index, weights, gate_up, down, activation, **options)
    sizes: dict[str, Any] = {"num_experts": EXPERTS, "num_local_experts": EXPERTS}
    sizes |= {"hidden_size": down.shape[1], "moe_intermediate_size": down.shape[2]}
    config = tiny_config("qwen3_moe", **sizes, hidden_act=ACTIVATIONS[activation])
    config._experts_implementation = "eager"
    experts = modelling("qwen3_moe").Qwen3MoeExperts(config)
    given = {"gate_up_proj": gate_up, "down_proj": down}
    return functional_call(experts, given, (hidden, index, weights))


def as_list(gate_up: torch.Tensor, down: torch.Tensor) -> tuple[list[Any], list[torch.Tensor]]:
    """The stacked weights as a list of experts, leaves of their own."""

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().requires_grad_(gate_up.requires_grad)

    pairs = [(leaf(gate), leaf(up)) for gate, up in (expert.chunk(2) for expert in gate_up)]
    return pairs, [expert.detach().clone().requires_grad_(down.requires_grad) for expert in down]


CASES = [
    *(
        case(route, dtypes, listed=listed, sizes=sizes)
        for route in ROUTES
        for dtypes in ((F32, F32), (BF16, BF16), (BF16, F32), (F16, F32))
        for listed, sizes in ((False, ODD), (False, EVEN), (True, ODD))
    ),
    *(
        case("several experts", (dtype, dtype), activation=activation)
        for activation in ("gelu_tanh", "gelu")
        for dtype in (F32, F16)
    ),
    *(
        case("several experts", (dtype, dtype), name=layout, layout=layout, sizes=EVEN)
        for dtype in (F32, BF16)
        for layout in ("transposed", "half", "sliced", "expanded")
    ),
    *(
        case("several experts", listed=listed, name=str(poison), poison=poison, sizes=EVEN)
        for listed in (False, True)
        for poison in (float("nan"), float("inf"))
    ),
    *(
        case("several experts", listed=listed, name=name, grads=grads, sizes=EVEN)
        for listed in (False, True)
        for name, grads in (
            ("frozen hidden", (False, True, True, True)),
            ("frozen routing", (True, False, True, True)),
            ("frozen experts", (True, True, False, False)),
            ("frozen down", (True, True, True, False)),
            ("only routing", (False, True, False, False)),
            ("only down", (False, False, False, True)),
            ("all frozen", (False, False, False, False)),
        )
    ),
]
PLAIN = [case("several experts", listed=listed, sizes=EVEN) for listed in (False, True)]


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
    assert TorchFusedMoE.refuse(*routed, gate_up, down, activation) is None
    if part == "gate_up":
        gate_up = (
            [*gate_up[:-1], (gate_up[-1][0], gate_up[-1][1].half())] if listed else gate_up.half()
        )
    else:
        down = [*down[:-1], down[-1].half()] if listed else down.half()
    assert "differ in dtype" in str(TorchFusedMoE.refuse(*routed, gate_up, down, activation))


def grouped_flop(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Of (rows, K) by (E, K, N), or of (M, rows) by (rows, N)."""
    return 2 * a[0] * a[1] * b[-1]


# Products of (gate_up, down) in one forward and backward: forward, gradient of rows, of weights.
FROZEN = [
    ("nothing", ALL, 3, 3),
    ("experts", (True, True, False, False), 2, 2),
    ("hidden", (False, True, True, True), 2, 3),
    ("hidden and gate_up", (False, True, False, True), 1, 3),
    ("all but the routing", (False, True, False, False), 1, 2),
]


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
    kind = "Qwen3MoeSparseMoeBlock" if name == "qwen3_moe" else "MixtralSparseMoeBlock"
    torch.manual_seed(0)
    block = getattr(modelling(name), kind)(config)
    tokens = draw((1, 7, config.hidden_size))
    out, logits = block(tokens)
    weights, index = F.softmax(logits, dim=1).topk(block.top_k, dim=-1)
    if norm_topk_prob or name == "mixtral":
        weights = weights / weights.sum(-1, keepdim=True)
    names = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    experts = [[getattr(expert, one).weight for one in names] for expert in block.experts]
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
