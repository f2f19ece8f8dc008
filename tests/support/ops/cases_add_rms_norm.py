"""add_rms_norm: the reference and every backend against the code of a decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call

from tests.support.ops.cases_rms_norm import EPS, FLAVOURS
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    SHORT,
    Case,
    draw,
)
from tests.support.tiny import modelling

Grads = tuple[bool, bool, bool]


def case(
    flavour: str = "LlamaRMSNorm",
    shape: tuple[int, ...] = (3, 5, 61),
    dtypes: tuple[torch.dtype, ...] = (F32, F32, F32),
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    grads: Grads = (True, True, True),
    poison: float | None = None,
) -> Case:
    """dtypes and grads are those of x, the residual and the weight."""
    module, offset, cast_first = FLAVOURS[flavour]

    def inputs(device: str) -> Any:
        x, residual = (
            draw(shape, dtypes[i], seed=i, layout=layouts[i], grad=grads[i], device=device)
            if i or poison is None
            else draw(shape, dtypes[i], poison=poison, grad=grads[i], device=device)
            for i in range(2)
        )
        weight = draw(shape[-1:], dtypes[2], seed=2, grad=grads[2], device=device)
        return (x, residual, weight, EPS, offset, cast_first), {}

    def original(x: Any, residual: Any, weight: Any, eps: float, *options: Any) -> Any:
        norm = getattr(modelling(module), flavour)(shape[-1], eps)
        hidden_states = residual + x
        return hidden_states, functional_call(norm, {"weight": weight}, (hidden_states,))

    shown = ["x".join(map(str, shape)), "-".join(SHORT[dtype] for dtype in dtypes)]
    shown += [layout for layout in layouts if layout != "contiguous"]
    shown += [f"frozen {i}" for i, grad in enumerate(grads) if not grad]
    shown += [str(poison)] if poison is not None else []
    return Case("-".join([flavour, *shown]), "add_rms_norm", inputs, original, exact=True)


CASES = [
    *(case(flavour, dtypes=(dtype,) * 3) for flavour in FLAVOURS for dtype in (F32, F16, BF16)),
    *(
        case(dtypes=dtypes)
        for dtypes in ((F16, F32, F16), (F32, F16, F16), (F16, F16, F32), (BF16, BF16, F32))
    ),
    *(case(shape=shape) for shape in ((0, 31), (64,), (2, 3, 4, 16), (5, 3))),
    *(
        case(shape=(2, 3, 4, 16), layouts=layouts)
        for layout in ("transposed", "heads", "half", "sliced", "expanded")
        for layouts in ((layout, "contiguous"), ("contiguous", layout), (layout, layout))
    ),
    *(
        case(grads=grads)
        for grads in (
            (True, False, False),
            (False, True, False),
            (False, False, True),
            (False, False, False),
        )
    ),
    *(case(poison=poison) for poison in (float("nan"), float("inf"), float("-inf"))),
]
PLAIN = [case(flavour) for flavour in FLAVOURS]
