"""qk_norm_rope: the reference and every backend against Qwen3's and Gemma's norm with rotary."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call

from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    SHORT,
    Case,
    draw,
)
from tests.support.tiny import modelling

EPS = 1e-6
#: Flavour -> (module of the norm, its class, offset, cast_first, module of the rotary, its width).
FLAVOURS = {
    "qwen3": ("qwen3", "Qwen3RMSNorm", 0.0, True, "qwen3", 10),
    "gemma": ("gemma", "GemmaRMSNorm", 1.0, False, "gemma", 10),
    "partial": ("gemma", "GemmaRMSNorm", 1.0, False, "phi3", 6),
}
#: Dtypes of q and k, of the weights, of cos and sin.
DTYPES = ((F32,) * 3, (BF16,) * 3, (F16,) * 3, (BF16, F32, BF16), (F16, F16, F32), (F32, BF16, F16))
HEADS, KV_HEADS, SIZE = 3, 1, 10


def case(
    flavour: str,
    dtypes: tuple[torch.dtype, ...] = DTYPES[0],
    *,
    batch: int = 2,
    length: int = 7,
    cos_batch: int = 1,
    unsqueeze_dim: int = 1,
    grads: tuple[bool, bool, bool, bool] = (True,) * 4,
    name: str = "plain",
    **drawn: Any,
) -> Case:
    """``grads`` are of q, k and their weights; ``drawn`` is about q and k: layout, poison."""
    module, norm_class, offset, cast_first, rotary, width = FLAVOURS[flavour]

    def inputs(device: str) -> Any:
        q, k = (
            draw(
                (batch, length, heads, SIZE),
                dtypes[0],
                seed=i,
                grad=grads[i],
                device=device,
                **drawn,
            )
            for i, heads in enumerate((HEADS, KV_HEADS))
        )
        weights = (
            draw((SIZE,), dtypes[1], seed=seed, grad=grads[seed], device=device) for seed in (2, 3)
        )
        angles = (
            draw((cos_batch, length, width), dtypes[2], seed=seed, grad=False, device=device)
            for seed in (4, 5)
        )
        return (q, k, *weights, EPS, *angles, unsqueeze_dim, offset, cast_first), {}

    def original(
        q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float, cos: Any, sin: Any, *options: Any
    ) -> Any:
        norm = getattr(modelling(module), norm_class)(SIZE, eps)
        q = functional_call(norm, {"weight": q_weight}, (q,))
        k = functional_call(norm, {"weight": k_weight}, (k,))
        if unsqueeze_dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        rotate = modelling(rotary).apply_rotary_pos_emb
        return rotate(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    kinds = "-".join(SHORT[dtype] for dtype in dtypes)
    return Case(f"{flavour}-{name}-{kinds}", "qk_norm_rope", inputs, original, exact=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "as after a transpose": {"layout": "heads"},
    "part of a wider tensor": {"layout": "half"},
    "every second element": {"layout": "sliced"},
    "expanded": {"layout": "expanded"},
    "one token": {"batch": 1, "length": 1},
    "no token": {"length": 0},
    "no sequence": {"batch": 0},
    "prime sizes": {"batch": 3, "length": 13},
    "cos of every sequence": {"cos_batch": 2},
    "heads after the sequence": {"unsqueeze_dim": 2},
    "NaN": {"poison": float("nan")},
    "Inf": {"poison": float("inf")},
    "q frozen": {"grads": (False, True, False, True)},
    "k and the weights frozen": {"grads": (True, False, False, False)},
    "one weight frozen": {"grads": (True, True, False, True)},
    "all frozen": {"grads": (False,) * 4},
}
CASES = [
    *(case(flavour, dtypes) for flavour in FLAVOURS for dtypes in DTYPES),
    *(
        case(flavour, (dtype,) * 3, name=name, **options)
        for flavour in FLAVOURS
        for dtype in (F32, BF16)
        for name, options in OPTIONS.items()
    ),
]
PLAIN = [case(flavour) for flavour in FLAVOURS]
