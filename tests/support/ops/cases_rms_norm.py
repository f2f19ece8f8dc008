"""rms_norm: the reference and every backend against Hugging Face, with and without a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call

from tests.support.ops import cases_rms_norm_extras
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    SHORT,
    Case,
    draw,
)
from tests.support.tiny import modelling

EPS = 1e-5
#: Class of the original -> (module, the op's offset and cast_first).
FLAVOURS = {
    "LlamaRMSNorm": ("llama", 0.0, True),
    "GemmaRMSNorm": ("gemma", 1.0, False),
    "Olmo2RMSNorm": ("olmo2", 0.0, False),
}
DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16))
SHAPES = ((1, 64), (0, 31), (2, 7, 97), (2, 5, 3, 16), (13, 3), (96, 512))


def case(
    flavour: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    grads: tuple[bool, bool] = (True, True),
    name: str = "",
    **drawn: Any,
) -> Case:
    """``drawn`` is about x: layout, scale, poison."""
    module, offset, cast_first = FLAVOURS[flavour]

    def inputs(device: str) -> Any:
        x = draw(shape, dtypes[0], grad=grads[0], device=device, **drawn)
        weight = draw(shape[-1:], dtypes[1], seed=1, grad=grads[1], device=device)
        return (x, weight, EPS, offset, cast_first), {}

    def original(x: Any, weight: Any, eps: float, *options: Any) -> Any:
        norm = getattr(modelling(module), flavour)(shape[-1], eps)
        return functional_call(norm, {"weight": weight}, (x,))

    shown = name or drawn.get("layout", "x".join(map(str, shape)))
    kinds = "-".join(SHORT[dtype] for dtype in dtypes)
    return Case(f"{flavour}-{shown}-{kinds}", "rms_norm", inputs, original, exact=True)


def gated_case(
    shape: tuple[int, ...] = (3, 7, 61),
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32),
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    grads: tuple[bool, bool, bool] = (True, True, True),
    **drawn: Any,
) -> Case:
    """dtypes and grads are those of x, the weight and the gate; layouts of x and the gate."""

    def inputs(device: str) -> Any:
        x, weight, gate = (
            draw(size, dtypes[i], seed=i, layout=layout, grad=grads[i], device=device, **options)
            for i, (size, layout, options) in enumerate(
                (
                    (shape, layouts[0], {}),
                    (shape[-1:], "contiguous", {}),
                    (shape, layouts[1], drawn),
                )
            )
        )
        return (x, weight, EPS, 0.0, True, gate), {}

    def original(
        x: Any, weight: Any, eps: float, offset: float, cast_first: bool, gate: Any
    ) -> Any:
        norm = modelling("qwen3_next").Qwen3NextRMSNormGated(shape[-1], eps)
        return functional_call(norm, {"weight": weight}, (x, gate))

    shown = ["x".join(map(str, shape)), "-".join(SHORT[dtype] for dtype in dtypes)]
    shown += [layout for layout in layouts if layout != "contiguous"]
    shown += [f"frozen {i}" for i, grad in enumerate(grads) if not grad]
    shown += [f"{name} {value}" for name, value in drawn.items()]
    return Case("-".join(["gated", *shown]), "rms_norm", inputs, original, exact=True)


GATED = [
    *(
        gated_case(dtypes=dtypes)
        for dtypes in (
            *((dtype,) * 3 for dtype in (F32, BF16, F16)),
            *((BF16, F32, BF16), (F16, F32, F16), (F32, BF16, F32), (BF16, BF16, F32)),
            (F32, F32, BF16),
        )
    ),
    *(
        gated_case(shape, (dtype,) * 3)
        for shape in ((1, 64), (0, 31), (13, 3), (2, 5, 3, 16), (96, 128))
        for dtype in (F32, BF16)
    ),
    *(
        gated_case((2, 3, 4, 16), layouts=layouts)
        for layout in ("transposed", "heads", "half", "sliced", "expanded")
        for layouts in ((layout, "contiguous"), ("contiguous", layout))
    ),
    *(
        gated_case(grads=grads)
        for grads in (
            (False, True, True),
            (True, False, True),
            (True, True, False),
            (False, False, True),
            (False, False, False),
        )
    ),
    *(gated_case((5, 33), poison=poison) for poison in (float("nan"), float("inf"))),
    *(gated_case((5, 33), (F16,) * 3, scale=scale) for scale in (0.0, 1e4)),
]
CASES = [
    *GATED,
    *cases_rms_norm_extras.CASES,
    *(
        case(flavour, (3, 7, 61), dtypes, layout=layout)
        for flavour in FLAVOURS
        for dtypes in DTYPES
        for layout in ("contiguous", "transposed", "half", "sliced", "expanded")
    ),
    *(
        case(flavour, shape, (dtype, dtype))
        for flavour in FLAVOURS
        for shape in SHAPES
        for dtype in (F32, BF16, F16)
    ),
    *(
        case(flavour, (5, 33), (dtype, dtype), name=str(poison), poison=poison)
        for flavour in FLAVOURS
        for dtype in (F32, BF16)
        for poison in (float("nan"), float("inf"), float("-inf"))
    ),
    *(
        case(flavour, (5, 33), dtypes, name=f"scaled by {scale}", scale=scale)
        for flavour in FLAVOURS
        for dtypes in ((F32, F32), (F16, F16))
        for scale in (0.0, 1e-4, 1e4)
    ),
    *(
        case(flavour, (5, 33), (F32, F32), grads, name=name)
        for flavour in FLAVOURS
        for name, grads in (
            ("frozen weight", (True, False)),
            ("frozen input", (False, True)),
            ("all frozen", (False, False)),
        )
    ),
]
PLAIN = [
    *(case(flavour, (3, 7, 61), (F32, F32)) for flavour in FLAVOURS),
    gated_case(),
    *cases_rms_norm_extras.PLAIN,
]
