"""The leaves: what each source text computes, and which adapter takes its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from hf_kernel_patch.ops.rope.shapes import FIRST_HALF, INTERLEAVED, PER_PAIR, TO_HALVES
from hf_kernel_patch.recognition.known import Adapter, Leaf, register
from hf_kernel_patch.recognition.leaves.rotary import adapters, adapters_of_one, texts
from hf_kernel_patch.recognition.leaves.rotary import texts_of_pairs as pairs
from hf_kernel_patch.recognition.leaves.rotary.adapters import without_unsqueeze_dim
from hf_kernel_patch.recognition.leaves.rotary.serving import Rotation
from hf_kernel_patch.recognition.source import innermost

_AdapterMaker = Callable[[Rotation], Adapter]
#: How a function takes its arguments, by the line that says so.
_TAKES: dict[str, _AdapterMaker] = {
    texts.V4: adapters.q_and_k_with_positions,
    texts.V5: adapters.q_and_k,
    texts.OPTIONAL: adapters.q_and_perhaps_k,
    texts.TOKENS_OF_K: adapters.tokens_of_k,
    texts.SECTIONS: adapters.sections,
    texts.PREFIX: adapters.after_prefix,
    texts.ONE_V4: adapters_of_one.one_tensor_with_positions,
    texts.ONE_V5: adapters_of_one.one_tensor,
    texts.SIN_FIRST: adapters_of_one.sin_first,
}
#: The same by the text that follows, where the first line does not say enough.
_TAKES_BY_BODY: dict[str, _AdapterMaker] = {
    texts.VISION: without_unsqueeze_dim(adapters.before_size),
    pairs.VISION_NEIGHBOURS: without_unsqueeze_dim(adapters.before_size),
    texts.VISION_PARTIAL: without_unsqueeze_dim(adapters.second),
    pairs.PLANE: without_unsqueeze_dim(adapters.before_tokens),
    pairs.TRAILING: adapters_of_one.trailing,
}

_FULL = Rotation()
_PARTIAL = Rotation(partial=True)
_FLOAT = Rotation(cast=True, upcast=True)
_FLOAT_OF_Q = Rotation(cast=True, upcast=True, one_dtype=True)
_PAIRS = Rotation(pairs=INTERLEAVED)
_PAIRS_PARTIAL = Rotation(pairs=INTERLEAVED, partial=True)
_PAIRS_FLOAT = Rotation(pairs=INTERLEAVED, cast=True, upcast=True)
_PAIRS_FLOAT_OF_Q = _PAIRS_FLOAT._replace(one_dtype=True)
_FIRST = Rotation(pairs=INTERLEAVED, angles=FIRST_HALF)
_FIRST_PARTIAL = Rotation(pairs=INTERLEAVED, angles=FIRST_HALF, partial=True)
_SORTED = Rotation(pairs=TO_HALVES, angles=FIRST_HALF)

_V5 = (texts.V5,)
_BOTH = (texts.V4, texts.V5)
_FOUR = (texts.ONLY_FOUR,)
_SECTIONS = (texts.SECTIONS,)
_HALVES = {"rotate_half": texts.ROTATE_HALF}
_Helpers = Mapping[str, str | tuple[str, ...]]
_Variants = tuple[tuple[tuple[str, ...], str, Rotation], ...]

#: Name -> the helpers that the functions call, and (first lines, what follows, what it computes).
_LEAVES: dict[str, tuple[_Helpers, _Variants]] = {
    "rope.full": (_HALVES, ((_BOTH, texts.FULL, _FULL),)),
    "rope.partial": (
        _HALVES,
        (
            (_BOTH, texts.PARTIAL, _PARTIAL),
            (_BOTH, texts.PARTIAL_IN_TWO_STEPS, _PARTIAL),
            (_BOTH, texts.PARTIAL_OVER_Q, _PARTIAL),
            ((texts.OPTIONAL,), texts.PARTIAL_OF_ONE_OR_TWO, _PARTIAL),
        ),
    ),
    "rope.cast": (_HALVES, ((_BOTH, texts.CAST, Rotation(cast=True)),)),
    "rope.float32": (
        _HALVES,
        ((_V5, texts.FLOAT, _FLOAT_OF_Q), (_V5, texts.FLOAT_ANGLES, _FLOAT_OF_Q)),
    ),
    "rope.vision": (
        _HALVES,
        ((_FOUR, texts.VISION, _FLOAT), (_FOUR, texts.VISION_PARTIAL, _PARTIAL)),
    ),
    "rope.prefix": (_HALVES, (((texts.PREFIX,), texts.AFTER_PREFIX, _FULL),)),
    "rope.one": (
        _HALVES,
        (
            ((texts.ONE_V4, texts.ONE_V5), texts.ONE, _FULL),
            ((texts.ONE_V5,), texts.ONE_BY_NAME, _FULL),
        ),
    ),
    "rope.sections": (
        _HALVES,
        ((_SECTIONS, texts.MERGED_WHOLE, _FULL), (_SECTIONS, texts.MERGED_PARTIAL, _PARTIAL)),
    ),
    "rope.gpt_oss": (
        {"_apply_rotary_emb": texts.OF_HALVES},
        ((_BOTH, texts.OF_EACH, Rotation(angles=PER_PAIR)),),
    ),
    # of pairs of neighbours
    "rope.interleaved": (
        {"rotate_half": pairs.NEIGHBOURS},
        (
            (_BOTH, texts.FULL, _PAIRS),
            (_BOTH, pairs.FIRST_HALF, _FIRST),
            (_BOTH, pairs.FIRST_HALF_PARTIAL, _FIRST_PARTIAL),
            (_BOTH, pairs.ERNIE, _PAIRS_FLOAT_OF_Q._replace(angles=FIRST_HALF)),
            (_BOTH, pairs.COHERE, _PAIRS_FLOAT_OF_Q),
            ((texts.ONE_V5,), pairs.TRAILING, _PAIRS_FLOAT._replace(angles=PER_PAIR)),
        ),
    ),
    "rope.glm4v": (
        {"rotate_half_llm": pairs.NEIGHBOURS[0]},
        (
            (_V5, pairs.GLM4V, _PAIRS_PARTIAL),
            (_V5, pairs.GLM4V_FIRST_HALF, _FIRST_PARTIAL),
            (_SECTIONS, pairs.GLM4V_MERGED, _FIRST_PARTIAL),
        ),
    ),
    "rope.ernie_vl": (
        {"rotate_half_text": pairs.NEIGHBOURS[0]},
        ((_V5, pairs.ERNIE_VL, _PAIRS_FLOAT_OF_Q),),
    ),
    "rope.pairwise": (
        {"rotate_pairwise": pairs.ROTATE_PAIRWISE},
        (
            (_FOUR, pairs.PLANE, _PAIRS_FLOAT),
            ((texts.TOKENS_OF_K,), pairs.PLANE_OF_K, _PAIRS_FLOAT),
            (_FOUR, pairs.VISION_NEIGHBOURS, _PAIRS_FLOAT),
        ),
    ),
    "rope.gptj": (
        {"rotate_every_two": pairs.ROTATE_EVERY_TWO},
        (((texts.SIN_FIRST,), pairs.EVERY_TWO, _PAIRS._replace(angles=PER_PAIR)),),
    ),
    "rope.pe_audio": (
        {"stack_freqs": pairs.STACK_FREQS},
        ((_V5, pairs.MATRICES, _FIRST._replace(four=True, stacked=True)),),
    ),
    "rope.privacy_filter": (
        {"_apply_rotary_emb": pairs.OF_NEIGHBOURS},
        ((_V5, texts.OF_EACH, _PAIRS._replace(angles=PER_PAIR)),),
    ),
    "rope.omni_codec": ({}, ((_BOTH, pairs.HELPER_INSIDE, _PAIRS),)),
    # of pairs of neighbours that become halves
    "rope.deepseek": (
        _HALVES,
        (
            ((texts.V4,), pairs.TO_HALVES, _SORTED),
            (_V5, pairs.TO_HALVES_OF_ONE_OR_TWO, _SORTED._replace(optional=True)),
            ((texts.V4,), pairs.SORTED_FIRST, Rotation(pairs=TO_HALVES, four=True)),
        ),
    ),
}


class _LeafWithSomeHelpers(Leaf):
    """A leaf whose texts do not all call its helpers: only what is called is compared."""

    def adapter_for(self, value: object, owner: object) -> Adapter | str:
        code = getattr(innermost(value), "__code__", None)
        called = getattr(code, "co_names", ())
        helpers = {name: source for name, source in self.helpers.items() if name in called}
        return Leaf.adapter_for(replace(self, helpers=helpers), value, owner)


def _leaf(name: str, helpers: _Helpers, variants: _Variants) -> Leaf:
    made = {
        head + body: (_TAKES_BY_BODY.get(body) or _TAKES[head])(rotation)
        for heads, body, rotation in variants
        for head in heads
    }
    leaf_class = _LeafWithSomeHelpers if name == "rope.deepseek" else Leaf
    return register(leaf_class(name, "rope", made, helpers))


LEAVES = {name: _leaf(name, *parts) for name, parts in _LEAVES.items()}
