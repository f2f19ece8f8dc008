"""Rotary functions of the families: one for each text of a leaf, and calls of them."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet

from hf_kernel_patch.ops.rope import TorchFusedRoPE
from hf_kernel_patch.recognition import Leaf, Site, build, known
from hf_kernel_patch.recognition.source import innermost

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HALVES = (F16, BF16)
#: (B, heads, S, D), (B, S, heads, D) and the (S, heads, D) of packed images.
HEADS_FIRST, TOKENS_FIRST, PACKED = "heads first", "tokens first", "packed"
VISION, SECTIONS = "apply_rotary_pos_emb_vision", "apply_multimodal_rotary_pos_emb"
PLANE, DEEPSEEK = "apply_rotary_pos_emb_2d", "apply_rotary_pos_emb_interleave"


class Place(NamedTuple):
    """A function of a family, the leaf that it is, and the shapes that its attention gives it."""

    leaf: str
    family: str
    function: str = "apply_rotary_pos_emb"
    angles: tuple[int, ...] = (1, 5, 10)
    layout: str = HEADS_FIRST
    versions: str = ""
    more: tuple[Any, ...] = ()

    @property
    def module(self) -> Any:
        """The modelling module; skips the test where this transformers has no such place."""
        name = f"transformers.models.{self.family}.modeling_{self.family}"
        here = SpecifierSet(self.versions).contains(transformers.__version__, prereleases=True)
        if not here or find_spec(name.rpartition(".")[0]) is None:
            pytest.skip(f"transformers {transformers.__version__} has it not")
        return importlib.import_module(name)

    @property
    def original(self) -> Any:
        """The function."""
        return getattr(self.module, self.function)


_PART, _PAIRS = (1, 5, 6), (1, 5, 5)
#: One for each text of a leaf.
PLACES = [
    Place("rope.full", "llama"),
    Place("rope.full", "pixtral", angles=(5, 10), more=(0,), versions=">=5.17"),
    Place("rope.partial", "phi3", angles=_PART),
    Place("rope.partial", "glm4_moe", angles=_PART),
    Place("rope.partial", "nemotron", angles=_PART),
    Place("rope.partial", "glmasr", angles=_PART, versions=">=5.17"),
    Place("rope.partial", "qwen4_exp", angles=_PART, versions=">=5.23"),
    Place("rope.cast", "olmo2"),
    Place("rope.float32", "modernbert", versions=">=5.5"),
    Place("rope.float32", "hunyuan_vl", versions=">=5.17"),
    Place("rope.vision", "qwen2_vl", VISION, (5, 10), PACKED),
    Place("rope.vision", "minimax_m3_vl", VISION, (5, 6), PACKED, ">=5.23"),
    Place("rope.prefix", "dinov3_vit", angles=(3, 10), versions=">=4.57"),
    Place("rope.one", "gemma3n", layout=TOKENS_FIRST, more=(2,), versions=">=5"),
    Place("rope.one", "gemma3n", layout=TOKENS_FIRST, more=(None, 2), versions="<5"),
    Place("rope.one", "glm_moe_dsa", versions=">=5.5,<5.6"),
    Place("rope.sections", "qwen2_vl", SECTIONS, (3, 2, 5, 10), versions="<5.6", more=([1, 2, 2],)),
    Place("rope.sections", "glm4v_moe", SECTIONS, (3, 2, 5, 6), versions="<5", more=([1, 1, 1],)),
    Place("rope.gpt_oss", "gpt_oss", angles=_PAIRS),
    Place("rope.interleaved", "blt"),
    Place("rope.interleaved", "helium"),
    Place("rope.interleaved", "glm", angles=_PART),
    Place("rope.interleaved", "ernie4_5"),
    Place("rope.interleaved", "cohere"),
    Place("rope.interleaved", "deepseek_v4", angles=(1, 5, 3), versions=">=5.17"),
    Place("rope.glm4v", "glm4v", angles=_PART, versions=">=5.5"),
    Place("rope.glm4v", "glm4v", SECTIONS, (3, 2, 5, 6), versions="<5", more=([1, 1, 1],)),
    Place("rope.ernie_vl", "ernie4_5_vl_moe", versions=">=5.5"),
    Place("rope.pairwise", "sam3", PLANE, (1, 5, 10), versions=">=5.17"),
    Place("rope.pairwise", "edgetam_video", f"{PLANE}_self_attn", (5, 10)),
    Place("rope.pairwise", "sam2_video", PLANE, (5, 10)),
    Place("rope.pairwise", "inkling2", VISION, (5, 10), PACKED, ">=5.23"),
    Place("rope.gptj", "gptj", angles=_PAIRS, layout=TOKENS_FIRST),
    Place("rope.pe_audio", "pe_audio", versions=">=5.5"),
    Place("rope.privacy_filter", "openai_privacy_filter", angles=_PAIRS, versions=">=5.17"),
    Place("rope.omni_codec", "qwen2_5_omni", versions="<5.6"),
    Place("rope.deepseek", "deepseek_v3", DEEPSEEK),
    Place("rope.deepseek", "mistral_large4", DEEPSEEK, versions=">=5.17"),
]
EVERY = pytest.mark.parametrize(
    "place", PLACES, ids=lambda p: f"{p.leaf}-{p.family}-{p.function[18:]}-{p.versions}"
)


def place_of(family: str) -> Place:
    return next(place for place in PLACES if place.family == family)


def leaf_of(place: Place) -> Leaf:
    leaf: Any = known()[place.leaf]
    return leaf


def serving(place: Place, kernel: Any = TorchFusedRoPE) -> tuple[Callable[..., Any], Counter[str]]:
    """What takes the function's place, and the outcomes of its calls."""
    original, module, leaf = place.original, place.module, leaf_of(place)
    adapter = leaf.adapter_for(original, module)
    assert not isinstance(adapter, str), adapter
    site, calls = Site(kernel, original, explicit=True), Counter[str]()
    site.active, site.counters = True, [calls]
    site.swallowed = leaf.swallowed(innermost(original), module)
    return build(adapter, site), calls


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(
    place: Place, dtypes: tuple[torch.dtype, ...] = (F32,) * 4, one: bool = False
) -> list[Any]:
    """q, k, cos and sin of these dtypes as the function takes them: as attention lays them out."""

    def heads(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
        if place.layout == PACKED:
            return drawn((5, 3, count, 10), dtype, seed)[:, seed]
        x = drawn((2, 5, count, 10), dtype, seed)
        return x.transpose(1, 2) if place.layout == HEADS_FIRST else x

    q, k = heads(3, dtypes[0], 0), heads(1, dtypes[1], 1)
    cos, sin = (drawn(place.angles, dtypes[seed], seed) for seed in (2, 3))
    if place.function == DEEPSEEK:  # whose older versions read both halves, always the same
        cos, sin = (angle[..., :5].repeat(1, 1, 2) for angle in (cos, sin))
    match list(inspect.signature(place.original).parameters)[:2]:
        case ["x", _]:
            return [q, cos, sin, *place.more]
        case ["tensor", "sin"]:
            return [q, sin, cos]
    return [q, None if one else k, cos, sin, *place.more]


def results(
    function: Callable[..., Any], arguments: list[Any], dtype: torch.dtype | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and gradients of q and k for random incoming ones; all in ``dtype``, if given."""
    given = [
        x.detach().to(dtype or x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments
    ]
    found = function(*[given[0].requires_grad_(), *_second(given), *given[2:]])
    outputs = [out for out in (found if isinstance(found, tuple) else (found,)) if out is not None]
    upstream = [drawn(tuple(out.shape), out.dtype, 7 + i) for i, out in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, given[: len(outputs)], upstream)
    return [out.detach() for out in outputs], list(grads)


def _second(given: list[Any]) -> list[Any]:
    """k, which gets a gradient; where q is alone, what follows it, which gets none."""
    k = given[1]
    return [k.requires_grad_() if k is not None and k.dim() == given[0].dim() else k]
