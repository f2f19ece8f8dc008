"""rope: the reference and every backend against apply_rotary_pos_emb of Llama, Phi-3 and OLMo2."""

from __future__ import annotations

from typing import Any

import torch

from tests.ops.checks import (
    BF16,
    F16,
    F32,
    SHORT,
    Case,
    draw,
)
from tests.tiny import modelling

#: Module of the original -> (width of cos out of a head size of 10, the op's cast).
FLAVOURS = {"llama": (10, False), "phi3": (6, False), "olmo2": (10, True)}
DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16))
HEADS, KV_HEADS, SIZE = 3, 1, 10


def case(
    flavour: str,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    *,
    batch: int = 2,
    length: int = 7,
    cos_batch: int = 1,
    unsqueeze_dim: int = 1,
    grads: tuple[bool, bool] = (True, True),
    name: str = "",
    **drawn: Any,
) -> Case:
    """q and cos have the two dtypes; ``drawn`` is about q and k: layout, poison."""
    width, cast = FLAVOURS[flavour]

    def inputs(device: str) -> Any:
        def heads(count: int, seed: int, grad: bool) -> torch.Tensor:
            order = (count, length) if unsqueeze_dim == 1 else (length, count)
            shape = (batch, *order, SIZE)
            return draw(shape, dtypes[0], seed=seed, grad=grad, device=device, **drawn)

        def angles(seed: int) -> torch.Tensor:
            shape = (cos_batch, length, width)
            return draw(shape, dtypes[1], seed=seed, grad=False, device=device)

        q, k = heads(HEADS, 0, grads[0]), heads(KV_HEADS, 1, grads[1])
        return (q, k, angles(2), angles(3), unsqueeze_dim, cast), {}

    def original(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int, cast: bool) -> Any:
        function = modelling(flavour).apply_rotary_pos_emb
        return function(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    kinds = "-".join(SHORT[dtype] for dtype in dtypes)
    return Case(f"{flavour}-{name or 'plain'}-{kinds}", "rope", inputs, original, exact=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "as attention lays q out": {"layout": "heads"},
    "half of a wider tensor": {"layout": "half"},
    "every second element": {"layout": "sliced"},
    "expanded": {"layout": "expanded"},
    "head size outermost": {"layout": "transposed"},
    "one token": {"batch": 1, "length": 1},
    "no token": {"length": 0},
    "no sequence": {"batch": 0},
    "prime sizes": {"batch": 3, "length": 13},
    "many tokens": {"batch": 8, "length": 128},
    "cos of every sequence": {"cos_batch": 2},
    "heads after the sequence": {"unsqueeze_dim": 2},
    "heads after the sequence, cos of every one": {"unsqueeze_dim": 2, "cos_batch": 2},
    "NaN": {"poison": float("nan")},
    "Inf": {"poison": float("inf")},
    "q frozen": {"grads": (False, True)},
    "k frozen": {"grads": (True, False)},
    "both frozen": {"grads": (False, False)},
}
CASES = [
    *(case(flavour, dtypes) for flavour in FLAVOURS for dtypes in DTYPES),
    *(
        case(flavour, (dtype, dtype), name=name, **options)
        for flavour in FLAVOURS
        for dtype in (F32, BF16)
        for name, options in OPTIONS.items()
    ),
]
PLAIN = [case(flavour) for flavour in FLAVOURS]
