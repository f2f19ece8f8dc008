"""swiglu: the reference and every backend against LlamaMLP, Phi3MLP and GemmaMLP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    SHORT,
    Case,
    draw,
)
from tests.support.tiny import modelling, tiny_config

#: Class of the original -> (module, activation, its name in a config, attribute of the function).
FLAVOURS = {
    "LlamaMLP": ("llama", "silu", {"hidden_act": "silu"}, "act_fn"),
    "Phi3MLP": ("phi3", "silu", {"hidden_act": "silu"}, "activation_fn"),
    "GemmaMLP": ("gemma", "gelu_tanh", {"hidden_act": "gelu_pytorch_tanh"}, "act_fn"),
    "MistralMLP": ("mistral", "gelu", {"hidden_act": "gelu"}, "act_fn"),
    "Qwen2MLP": ("qwen2", "gelu_tanh", {"hidden_act": "gelu_new"}, "act_fn"),
}
#: Whose activation rounds at each of its steps.
STEPWISE = ("Qwen2MLP",)
DTYPES = (F32, BF16, F16)


def case(
    flavour: str,
    shape: tuple[int, ...],
    dtype: Any = F32,
    grads: tuple[bool, bool] = (True, True),
    name: str = "",
    **drawn: Any,
) -> Case:
    """``drawn`` is about gate and up: layout, scale, poison."""
    module, activation, act, attribute = FLAVOURS[flavour]

    def inputs(device: str) -> Any:
        gate, up = (
            draw(shape, dtype, seed=seed, grad=grad, device=device, **drawn)
            for seed, grad in enumerate(grads)
        )
        return (gate, up, activation), {}

    def original(gate: Any, up: Any, activation: str) -> Any:
        kind = getattr(modelling(module), flavour)
        mlp = kind(tiny_config(module, **act))
        # The original's forward and activation, between projections that hand through.
        passing = SimpleNamespace(
            gate_proj=lambda x: x[0],
            up_proj=lambda x: x[1],
            gate_up_proj=lambda x: SimpleNamespace(chunk=lambda parts, dim: x),
            down_proj=lambda y: y,
            **{attribute: getattr(mlp, attribute)},
        )
        return kind.forward(passing, (gate, up))

    shown = name or drawn.get("layout", "x".join(map(str, shape)))
    label = f"{flavour}-{shown}-{SHORT[dtype]}"
    return Case(label, "swiglu", inputs, original, exact=flavour not in STEPWISE)


CASES = [
    case(flavour, dtype=dtype, **options)
    for flavour in FLAVOURS
    for dtype in DTYPES
    for options in (
        *({"shape": shape} for shape in ((1, 64), (0, 31), (2, 7, 97), (13, 1), (5,), (96, 512))),
        *(
            {"shape": (3, 7, 61), "layout": layout}
            for layout in ("transposed", "half", "sliced", "expanded")
        ),
        *({"shape": (5, 33), "poison": x, "name": str(x)} for x in map(float, ("nan", "inf"))),
        {"shape": (5, 33), "poison": float("-inf"), "name": "-inf"},
        *({"shape": (5, 33), "scale": s, "name": f"scaled by {s}"} for s in (0.0, 30.0)),
        {"shape": (5, 33), "grads": (False, True), "name": "gate frozen"},
        {"shape": (5, 33), "grads": (True, False), "name": "up frozen"},
        {"shape": (5, 33), "grads": (False, False), "name": "both frozen"},
    )
]
PLAIN = [case(flavour, (3, 7, 61)) for flavour in FLAVOURS]
