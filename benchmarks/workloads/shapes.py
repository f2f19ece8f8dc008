"""The shapes: data. Sizes are those of real layers; a CPU gets fewer rows of the same layers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    ``compiled`` marks the shapes that torch.compile is measured at too, as it compiles anew for
    each; ``phases`` are the op's own where empty.
    """

    op: str
    sizes: dict[str, int]
    compiled: bool = False
    phases: tuple[str, ...] = ()
    label: str = field(default="")

    def __post_init__(self) -> None:
        if not self.label:
            text = " ".join(f"{name}{size}" for name, size in self.sizes.items())
            object.__setattr__(self, "label", text)


def _rows(op: str, *shapes: tuple[int, ...], compiled: tuple[int, ...] = (0,)) -> list[Case]:
    """Cases of (rows, width), or (rows, heads, width) for rows of several heads."""
    return [
        Case(
            op,
            {"rows": shape[0] * (shape[1] if len(shape) == 3 else 1), "width": shape[-1]},
            compiled=place in compiled,
            label="x".join(map(str, shape)),
        )
        for place, shape in enumerate(shapes)
    ]


def _heads(op: str, *shapes: tuple[int, int, int, int, int], compiled: bool = True) -> list[Case]:
    """Cases of (batch, tokens, heads, key-value heads, head size); the first one is compiled."""
    names = ("B", "S", "q", "k", "d")
    return [
        Case(op, dict(zip(names, shape, strict=True)), compiled=compiled and place == 0)
        for place, shape in enumerate(shapes)
    ]


def _paired(
    shape: tuple[int, int, int, int, int], to_halves: bool = False, compiled: bool = True
) -> Case:
    """The rotary function of pairs of neighbours, GLM's, or that of DeepSeek to halves."""
    (plain,) = _heads("rope", shape)
    name = "to halves" if to_halves else "interleaved"
    sizes = {**plain.sizes, "pairs": int(to_halves)}
    return Case("rope", sizes, compiled, label=f"{plain.label} {name}")


def _experts(
    tokens: int, phases: tuple[str, ...], compiled: bool = False, name: str = "", **changed: int
) -> Case:
    """Qwen3-30B-A3B's experts, with other sizes where given."""
    sizes = {"T": tokens, "E": 128, "K": 8, "H": 2048, "I": 768, **changed}
    return Case("moe", sizes, compiled, phases, label=f"T{tokens} {name or 'E128'}")


def _loss(
    tokens: int, hidden: int, vocabulary: int, compiled: bool = False, phases: tuple[str, ...] = ()
) -> Case:
    sizes = {"T": tokens, "H": hidden, "V": vocabulary}
    return Case("linear_cross_entropy", sizes, compiled, phases)


_BOTH = ("inference", "step")
_TINY_EXPERTS = {"T": 8, "E": 4, "K": 2, "H": 32, "I": 16}

ACCELERATOR: list[Case] = [
    *_rows(
        "rms_norm",
        (16384, 2048),
        (16384, 4096),
        (8192, 8192),
        (8192, 32, 128),
        (16384, 896),
        (16384, 1536),
        (16384, 3584),
        (16384, 5120),
        (7, 2048),
        (1000, 4096),
        compiled=(0, 1, 2, 3),
    ),
    *_rows(
        "add_rms_norm",
        (16384, 2048),
        (16384, 4096),
        (16384, 896),
        (16384, 1536),
        (16384, 3584),
        (16384, 5120),
        (7, 2048),
        (1000, 4096),
        compiled=(0, 1),
    ),
    *_heads("rope", (4, 4096, 32, 8, 128)),
    *_heads("rope", (4, 4096, 32, 8, 64)),
    *_heads(
        "rope", (4, 4096, 28, 4, 128), (1, 7, 32, 8, 64), (1, 1000, 32, 8, 128), compiled=False
    ),
    # Beside the halves of the same shapes.
    _paired((4, 4096, 32, 8, 128)),
    _paired((4, 4096, 32, 8, 64)),
    _paired((1, 7, 32, 8, 64), compiled=False),
    *_heads("rope", (4, 4096, 128, 1, 64)),
    _paired((4, 4096, 128, 1, 64), to_halves=True),
    *_heads("qk_norm_rope", (4, 4096, 32, 4, 128)),
    *_heads(
        "qk_norm_rope",
        (4, 4096, 16, 8, 128),
        (1, 7, 32, 4, 128),
        (1, 1000, 32, 4, 128),
        compiled=False,
    ),
    *_rows(
        "swiglu",
        (16384, 8192),
        (65536, 768),
        (16384, 14336),
        (16384, 8960),
        (16384, 4864),
        (7, 8192),
        (1000, 8192),
        compiled=(0, 1),
    ),
    # The largest first, as some peers choose their tiles at the first call for good.
    _experts(16384, _BOTH),
    _experts(4096, _BOTH, compiled=True),
    _experts(4096, _BOTH, name="E128 skewed", skew=1),
    _experts(4096, _BOTH, name="Mixtral", E=8, K=2, H=4096, I=14336),
    _experts(256, ("inference",)),
    _experts(16, ("inference",)),
    _experts(1, ("inference",)),
    _loss(8192, 2048, 128256, compiled=True),
    _loss(8192, 4096, 128256, compiled=True, phases=("step",)),
    _loss(16384, 2048, 151936, compiled=True, phases=("step",)),
]
CPU: list[Case] = [
    *_rows("rms_norm", (512, 2048), (512, 4096), (256, 32, 128), (7, 2048)),
    *_rows("add_rms_norm", (512, 2048), (512, 4096), (7, 2048)),
    *_heads("rope", (1, 512, 32, 8, 128), (1, 512, 32, 8, 64), (1, 7, 32, 8, 64)),
    *_heads("qk_norm_rope", (1, 512, 32, 4, 128), (1, 7, 32, 4, 128)),
    *_rows("swiglu", (512, 8192), (2048, 768), (7, 8192)),
    _experts(1, ("inference",), E=16, name="E16"),
    _experts(16, ("inference",), E=16, name="E16"),
    _experts(256, _BOTH, E=16, name="E16", compiled=True),
    _loss(256, 2048, 16384, compiled=True),
]
#: Small enough for a smoke test on any device; none is compiled.
QUICK: list[Case] = [
    *_rows("rms_norm", (8, 64), compiled=()),
    *_rows("add_rms_norm", (8, 64), compiled=()),
    *(_paired((1, 6, 4, 2, 16), to_halves, compiled=False) for to_halves in (False, True)),
    *_heads("rope", (1, 6, 4, 2, 16), compiled=False),
    *_heads("qk_norm_rope", (1, 6, 4, 2, 16), compiled=False),
    *_rows("swiglu", (8, 64), compiled=()),
    Case("moe", _TINY_EXPERTS, phases=_BOTH),
    _loss(12, 32, 64),
]
#: One token of a Llama-3.2-1B layer, and of a Qwen3-30B-A3B layer, for the host time of a call.
ONE_TOKEN: list[Case] = [
    *_rows("rms_norm", (1, 2048)),
    *_rows("add_rms_norm", (1, 2048)),
    *_heads("rope", (1, 1, 32, 8, 64)),
    *_heads("qk_norm_rope", (1, 1, 32, 4, 128)),
    *_rows("swiglu", (1, 8192)),
    _experts(1, ("inference",), E=16, name="E16"),
]
ONE_TOKEN_QUICK: list[Case] = [
    case for case in QUICK if case.op != "linear_cross_entropy" and "pairs" not in case.sizes
]


def cases(device: str, quick: bool, launch: bool) -> list[Case]:
    """The shapes of a run."""
    if launch:
        return ONE_TOKEN_QUICK if quick else ONE_TOKEN
    return QUICK if quick else CPU if device == "cpu" else ACCELERATOR
