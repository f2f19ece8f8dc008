"""moe with a gate of the experts' own: against GPT-OSS's experts and others of transformers 5."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call
from torch.nn import functional as F

from hf_kernel_patch.ops.moe import reference
from hf_kernel_patch.ops.moe.reference import Gating
from tests.support.ops.cases_moe import EVEN, EXPERTS, ODD, ROUTES
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    SHORT,
    Case,
    draw,
)
from tests.support.tiny import modelling, tiny_config


def interleaved(rows: torch.Tensor) -> torch.Tensor:
    """GPT-OSS's gate."""
    gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def halves(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate).clamp(max=0.5) * up


def case(
    route: str,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    *,
    sizes: tuple[int, int] = EVEN,
    biased: bool = True,
    frozen: tuple[str, ...] = (),
    name: str = "",
    **drawn: Any,
) -> Case:
    """With biases GPT-OSS's experts, without them such as DeepSeek-V4's."""
    index = torch.tensor(ROUTES[route], dtype=torch.long).reshape(-1, 2)
    dtype, (size, width) = dtypes[0], sizes
    shapes = {
        "gate_up": (EXPERTS, size, 2 * width) if biased else (EXPERTS, 2 * width, size),
        "down": (EXPERTS, width, size) if biased else (EXPERTS, size, width),
        "gate_up_bias": (EXPERTS, 2 * width),
        "down_bias": (EXPERTS, size),
    }

    def inputs(device: str) -> Any:
        hidden = draw((len(index), size), dtype, grad="hidden" not in frozen, **drawn)
        logits = draw((len(index), 2), seed=1, grad=False).softmax(-1)
        weights = logits.to(dtypes[1]).requires_grad_("weights" not in frozen)
        parts = {
            own: draw(shape, dtype, seed=seed, scale=size**-0.5, grad=own not in frozen)
            for seed, (own, shape) in enumerate(shapes.items(), 2)
        }
        biases = (parts["gate_up_bias"], parts["down_bias"]) if biased else (None, None)
        gating = Gating(interleaved if biased else halves, *biases, transposed=biased)
        return (hidden, index, weights, parts["gate_up"], parts["down"], gating), {}

    names = "-".join(SHORT[dtype] for dtype in dtypes)
    label = f"{name or route}-{'x'.join(map(str, sizes))}-{'biased' if biased else 'plain'}-{names}"
    return Case(label, "moe", inputs, original)


def original(
    hidden: Any, index: Any, weights: Any, gate_up: Any, down: Any, gating: Gating
) -> torch.Tensor:
    """GPT-OSS's experts in the loop that is their own code; without biases the definition.

    The loop knows no experts of other ranks.
    """
    if gating.gate_up_bias is None or bool((index == EXPERTS).any()):
        return reference.moe(hidden, index, weights, gate_up, down, gating, dtype=hidden.dtype)
    experts = gpt_oss_experts(hidden.shape[1], down.shape[1])
    experts.config._experts_implementation = "eager"
    return functional_call(experts, named(gate_up, down, gating), (hidden, index, weights))


def gpt_oss_experts(size: int, width: int) -> Any:
    sizes = {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "hidden_size": size}
    config = tiny_config("gpt_oss", **sizes, intermediate_size=width)
    return modelling("gpt_oss").GptOssExperts(config)


def named(gate_up: Any, down: Any, gating: Gating) -> dict[str, Any]:
    """The parameters of GPT-OSS's experts."""
    return {
        "gate_up_proj": gate_up,
        "down_proj": down,
        "gate_up_proj_bias": gating.gate_up_bias,
        "down_proj_bias": gating.down_bias,
    }


CASES = [
    *(
        case(route, dtypes, sizes=sizes, biased=biased)
        for route in ROUTES
        for dtypes, sizes in (((F32, F32), ODD), ((BF16, BF16), EVEN), ((F16, F32), EVEN))
        for biased in (False, True)
        if route != "no token"
    ),
    *(
        case("several experts", name=layout, layout=layout, biased=False)
        for layout in ("transposed", "half", "sliced", "expanded")
    ),
    *(
        case("several experts", name=str(poison), poison=poison)
        for poison in (float("nan"), float("inf"))
    ),
    *(
        case("several experts", name=f"frozen {' '.join(frozen)}", frozen=frozen)
        for frozen in (
            ("hidden",),
            ("weights",),
            ("gate_up", "down"),
            ("gate_up_bias", "down_bias"),
            ("hidden", "gate_up", "down", "down_bias"),
            ("hidden", "weights", "gate_up", "down", "gate_up_bias", "down_bias"),
        )
    ),
]
PLAIN = [case("several experts", biased=biased) for biased in (False, True)]
