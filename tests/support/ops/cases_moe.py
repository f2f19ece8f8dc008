"""moe: the reference and every backend against the experts of transformers 5 and the lists of 4."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch.func import functional_call

from hf_kernel_patch.ops.moe import reference
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    SHORT,
    Case,
    draw,
)
from tests.support.tiny import TRANSFORMERS_5, modelling, tiny_config

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

    names = "-".join(SHORT[dtype] for dtype in dtypes)
    layout = f"{'list' if listed else 'stacked'}-{'x'.join(map(str, sizes))}"
    shown = f"{name or route}-{layout}-{activation}-{names}"
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
# Products of (gate_up, down) in one forward and backward: forward, gradient of rows, of weights.
FROZEN = [
    ("nothing", ALL, 3, 3),
    ("experts", (True, True, False, False), 2, 2),
    ("hidden", (False, True, True, True), 2, 3),
    ("hidden and gate_up", (False, True, False, True), 1, 3),
    ("all but the routing", (False, True, False, False), 1, 2),
]
