"""lora: the reference and every backend against PEFT's layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from tests.support.ops.checks import BF16, F16, F32, SHORT, Case, draw


class Given(nn.Module):
    """Gives a tensor, whatever it is called with."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value


def original(
    x: Any,
    a: Any,
    b: Any,
    scaling: float,
    weight: Any = None,
    bias: Any = None,
    base: Any = None,
    dropped: Any = None,
    b_bias: Any = None,
    scale: Any = None,
) -> Any:
    """PEFT's layer with these weights; ``scale`` as its DoRA applies it."""
    import peft
    from peft.tuners.lora.layer import Linear

    sizes = a.shape[1], b.shape[0]
    config = peft.LoraConfig(lora_alpha=1, lora_bias=b_bias is not None)
    under = nn.Linear(*sizes, bias=bias is not None)
    layer: Any = Linear(under, "default", r=a.shape[0], config=config, lora_alpha=1)
    layer.scaling["default"] = scaling
    weights = {"lora_A.default.weight": a, "lora_B.default.weight": b}
    if b_bias is not None:
        weights["lora_B.default.bias"] = b_bias
    if dropped is not None:
        layer.lora_dropout["default"] = Given(dropped.to(a.dtype))
    if base is not None:
        layer.base_layer = Given(base)
    else:
        weights["base_layer.weight"] = weight
        if bias is not None:
            weights["base_layer.bias"] = bias
    if scale is None:
        return functional_call(layer, weights, (x,))
    result = base if base is not None else nn.functional.linear(x, weight)
    inner = nn.functional.linear((x if dropped is None else dropped).to(a.dtype), a)
    added = nn.functional.linear(inner, b, b_bias)
    total = result + (scale - 1) * result + scale * added * scaling
    return (total if bias is None else total + bias).to(result.dtype)


def case(
    shape: tuple[int, ...],
    rank: int,
    out: int,
    dtype: Any = F32,
    adapter: Any = None,
    given: str = "weight",
    frozen: str = "",
    name: str = "",
    **drawn: Any,
) -> Case:
    """``given`` and ``frozen`` name arguments; ``drawn`` is about x: layout, poison."""
    adapter = adapter or dtype
    extras = given.split()

    def inputs(device: str) -> Any:
        def one(which: str, size: tuple[int, ...], kind: Any, **more: Any) -> Any:
            seed = sum(map(ord, which))
            grad = which not in frozen.split()
            return draw(size, kind, seed=seed, grad=grad, device=device, **more)

        fan = 1 / shape[-1] ** 0.5
        options = {
            "weight": ((out, shape[-1]), dtype, fan),
            "bias": ((out,), dtype, 1.0),
            "base": ((*shape[:-1], out), dtype, 1.0),
            "dropped": (shape, adapter, 1.0),
            "b_bias": ((out,), adapter, 1.0),
            "scale": ((out,), adapter, 1.0),
        }
        chosen = {
            key: one(key, size, kind, scale=spread)
            for key, (size, kind, spread) in options.items()
            if key in extras
        }
        x = one("x", shape, dtype, **drawn)
        a, b = one("a", (rank, shape[-1]), adapter, scale=fan), one("b", (out, rank), adapter)
        return (x, a, b, 0.75), chosen

    label = name or "x".join(map(str, (*shape, rank, out)))
    mixed = SHORT[dtype] if adapter is dtype else f"{SHORT[dtype]}-{SHORT[adapter]}"
    return Case(f"{label}-{given.replace(' ', '+')}-{mixed}", "lora", inputs, original)


DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16))
CASES = [
    *(
        case(shape, rank, out, dtype, adapter)
        for shape, rank, out in (((5, 31), 3, 17), ((2, 7, 64), 8, 96), ((3, 2, 4, 33), 1, 5))
        for dtype, adapter in DTYPES
    ),
    *(
        case((3, 5, 33), 4, 19, dtype, adapter, given)
        for dtype, adapter in DTYPES
        for given in (
            "weight bias",
            "weight bias b_bias",
            "weight dropped",
            "weight scale",
            "weight bias scale b_bias",
            "base",
            "base dropped b_bias",
            "base dropped scale",
        )
    ),
    case((0, 31), 3, 17),
    case((1, 31), 3, 17),
    *(case((3, 5, 33), 4, 19, layout=one, name=one) for one in ("transposed", "half", "sliced")),
    *(case((5, 33), 4, 19, poison=float(one), name=one) for one in ("nan", "inf")),
    *(
        case((5, 33), 4, 19, given=given, frozen=frozen, name=f"{frozen} frozen")
        for given in ("weight bias", "base", "weight dropped bias scale")
        for frozen in ("x", "weight bias", "a", "b", "a b", "x weight a", "x weight bias a b")
    ),
]
PLAIN = [
    case((3, 33), 4, 19, given=given) for given in ("weight bias", "base b_bias", "weight scale")
]
