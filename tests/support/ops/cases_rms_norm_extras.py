"""rms_norm with the arguments after the gate: by groups, without a weight, and other gates."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch.func import functional_call

from tests.support.ops.checks import BF16, F16, F32, SHORT, Case, draw

EPS = 1e-5


class Original(NamedTuple):
    """A norm that needs the op's arguments after the gate, and these for rows of three groups."""

    module: str
    #: Its class, and how it is made for a row of so many elements.
    name: str
    made: Any
    offset: float
    cast_first: bool
    extras: tuple[Any, ...] = ()
    weighted: bool = True
    gated: bool = False


ORIGINALS = {
    one.name: one
    for one in (
        Original("llama4", "Llama4TextL2Norm", lambda h: {"eps": EPS}, 0.0, True, weighted=False),
        Original(
            *("deepseek_v4", "DeepseekV4UnweightedRMSNorm", lambda h: {"eps": EPS}, 0.0, True),
            (None, True, "silu", False, True),
            weighted=False,
        ),
        Original("t5", "T5LayerNorm", lambda h: {"hidden_size": h, "eps": EPS}, 0.0, True),
        Original(
            *("zamba2", "Zamba2RMSNormGated"),
            lambda h: {"hidden_size": h, "group_size": h // 3, "eps": EPS},
            *(0.0, True, (3, False)),
            gated=True,
        ),
        Original(
            *("kimi_linear", "KimiLinearRMSNormGated"),
            lambda h: {"hidden_size": h, "eps": EPS},
            *(0.0, False, (None, True, "sigmoid")),
            gated=True,
        ),
        Original(
            *("lara_mini", "LaraMiniRMSNormGated"),
            lambda h: {"hidden_size": h, "eps": EPS},
            *(0.0, False, (None, True, "silu")),
            gated=True,
        ),
        Original(
            *("qwen4_exp", "Qwen4ExpTextRMSNorm"),
            lambda h: {"dim": h, "group_size": h // 3, "eps": EPS},
            *(1.0, False, (3,)),
        ),
    )
    if find_spec(f"transformers.models.{one.module}")
}


def case(
    flavour: str,
    shape: tuple[int, ...] = (3, 7, 57),
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32),
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    grads: tuple[bool, bool, bool] = (True, True, True),
    gate: bool = True,
    **drawn: Any,
) -> Case:
    """dtypes and grads are those of x, the weight and the gate; ``drawn`` is about x."""
    one = ORIGINALS[flavour]
    module = importlib.import_module(f"transformers.models.{one.module}.modeling_{one.module}")

    def inputs(device: str) -> Any:
        options = {"layout": layouts[0], "grad": grads[0], "device": device}
        x = draw(shape, dtypes[0], **options, **drawn)
        weight = second = None
        if one.weighted:
            weight = draw(shape[-1:], dtypes[1], seed=1, grad=grads[1], device=device)
        if one.gated and gate:
            options |= {"layout": layouts[1], "grad": grads[2]}
            second = draw(shape, dtypes[2], seed=2, **options)
        extras = list(one.extras)
        if extras and extras[0] is not None:
            extras[0] = shape[-1] // extras[0]
        if flavour == "T5LayerNorm" and dtypes[0] != dtypes[1]:
            extras = [None, True, "silu", True]
        return (x, weight, EPS, one.offset, one.cast_first, second, *extras), {}

    def original(x: Any, weight: Any, *options: Any) -> Any:
        norm = getattr(module, flavour)(**one.made(shape[-1]))
        second = options[3] if one.gated else None
        given = {} if weight is None else {"weight": weight}
        return functional_call(norm, given, (x,) if second is None else (x, second))

    shown = ["x".join(map(str, shape)), "-".join(SHORT[dtype] for dtype in dtypes)]
    shown += [layout for layout in layouts if layout != "contiguous"]
    shown += [f"frozen {i}" for i, grad in enumerate(grads) if not grad]
    shown += [f"{name} {value}" for name, value in drawn.items()]
    shown += [] if gate or not one.gated else ["no gate"]
    return Case("-".join([flavour, *shown]), "rms_norm", inputs, original, exact=True)


CASES = [
    *(
        case(flavour, dtypes=dtypes)
        for flavour in ORIGINALS
        for dtypes in (
            *((dtype,) * 3 for dtype in (F32, BF16, F16)),
            *((BF16, F32, BF16), (F32, BF16, F32), (F16, F32, F16), (F32, F16, F32)),
            *((F16, BF16, F32),),
        )
    ),
    *(
        case(flavour, shape, (dtype,) * 3)
        for flavour in ORIGINALS
        for shape in ((1, 96), (0, 33), (13, 3), (2, 5, 3, 15), (96, 129))
        for dtype in (F32, F16)
        # Qwen4's own cannot tell how many groups no row has.
        if shape[0] or flavour != "Qwen4ExpTextRMSNorm"
    ),
    *(
        case(flavour, (2, 3, 4, 24), layouts=layouts)
        for flavour in ORIGINALS
        for layout in ("transposed", "heads", "half", "sliced", "expanded")
        for layouts in ((layout, "contiguous"), ("contiguous", layout))
        if layouts[1] == "contiguous" or ORIGINALS[flavour].gated
    ),
    *(
        case(flavour, grads=grads)
        for flavour in ORIGINALS
        for grads in (
            *((False, True, True), (True, False, True), (True, True, False)),
            *((False, False, True), (False, True, False), (False, False, False)),
        )
    ),
    *(
        case(flavour, (5, 33), (dtype,) * 3, poison=poison)
        for flavour in ORIGINALS
        for dtype in (F32, F16)
        for poison in (float("nan"), float("inf"), float("-inf"))
    ),
    *(
        case(flavour, (5, 33), (F16,) * 3, scale=scale)
        for flavour in ORIGINALS
        for scale in (0, 1e4)
        # DeepSeek's own sums up gradients in float16 there, beyond what that holds.
        if not scale or flavour != "DeepseekV4UnweightedRMSNorm"
    ),
    case("Zamba2RMSNormGated", gate=False),
    case("Zamba2RMSNormGated", dtypes=(F16, F32, F16), gate=False),
]
#: The squares of a norm without a weight have no gradient to speak of.
PLAIN = [case(name) for name, one in ORIGINALS.items() if one.weighted]
