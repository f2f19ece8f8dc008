"""rope: the reference and every backend against the rotary functions of seven families."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch

from hf_kernel_patch.ops.rope.shapes import (
    ELEMENTS,
    FIRST_HALF,
    HALVES,
    INTERLEAVED,
    PER_PAIR,
    TO_HALVES,
)
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    SHORT,
    Case,
    draw,
)

HEADS, KV_HEADS, SIZE = 3, 1, 10


class Flavour(NamedTuple):
    """The width of cos, the op's last four arguments, and the function's name."""

    width: int = SIZE
    options: tuple[Any, ...] = (False,)
    function: str = "apply_rotary_pos_emb"


#: By the module of the original.
FLAVOURS = {
    "llama": Flavour(),
    "phi3": Flavour(6),
    "olmo2": Flavour(options=(True,)),
    "gpt_oss": Flavour(SIZE // 2, (False, HALVES, PER_PAIR)),
    "cohere": Flavour(options=(True, INTERLEAVED, ELEMENTS, True)),
    "glm": Flavour(6, (False, INTERLEAVED, FIRST_HALF)),
    "deepseek_v3": Flavour(
        options=(False, TO_HALVES, FIRST_HALF), function="apply_rotary_pos_emb_interleave"
    ),
}
OLD = ("llama", "phi3", "olmo2")
PAIRS = ("cohere", "glm", "deepseek_v3")
#: Of q and k, of cos, and of sin where it has another.
DTYPES: tuple[tuple[torch.dtype, ...], ...] = (
    *((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16)),
    *((BF16, BF16, F32), (BF16, F32, BF16), (F16, BF16, F16)),
)


def case(
    flavour: str,
    dtypes: tuple[torch.dtype, ...] = (F32, F32),
    *,
    batch: int = 2,
    length: int = 7,
    cos_batch: int = 1,
    unsqueeze_dim: int = 1,
    grads: tuple[bool, bool] = (True, True),
    name: str = "",
    **drawn: Any,
) -> Case:
    """``drawn`` is about q and k: layout, poison."""
    width, options, function = FLAVOURS[flavour]

    def inputs(device: str) -> Any:
        def heads(count: int, seed: int, grad: bool) -> torch.Tensor:
            order = (count, length) if unsqueeze_dim == 1 else (length, count)
            shape = (batch, *order, SIZE)
            return draw(shape, dtypes[0], seed=seed, grad=grad, device=device, **drawn)

        def angles(dtype: torch.dtype, seed: int) -> torch.Tensor:
            # Older versions of DeepSeek's function read both halves, which are always the same.
            halves = 2 if flavour == "deepseek_v3" else 1
            shape = (cos_batch, length, width // halves)
            drawn = draw(shape, dtype, seed=seed, grad=False, device=device)
            return drawn.repeat(1, 1, halves)

        q, k = heads(HEADS, 0, grads[0]), heads(KV_HEADS, 1, grads[1])
        cos, sin = angles(dtypes[1], 2), angles(dtypes[-1], 3)
        return (q, k, cos, sin, unsqueeze_dim, *options), {}

    def original(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int, *options: Any) -> Any:
        module = importlib.import_module(f"transformers.models.{flavour}.modeling_{flavour}")
        return getattr(module, function)(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

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
        for flavour in OLD
        for dtype in (F32, BF16)
        for name, options in OPTIONS.items()
    ),
    *(
        case(flavour, (F32, F32), name=name, **options)
        for flavour in PAIRS
        for name, options in OPTIONS.items()
    ),
]
PLAIN = [case(flavour) for flavour in FLAVOURS]
