"""What the tests of whole tokens decoded at once share: models, patches, loops, comparisons."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import ModelOutput

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.recognition.outcome import How
from tests.support.tiny import error, modelling, tiny_model, tokens

#: What ``fused`` patches: "auto", or ids of kernels separated by commas.
INCLUDE = "auto" if torch.cuda.is_available() else "torch_fused_decode_attention"
OP = "decode_attention"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Relative error of logits, and of keys and values.
CLOSE = 5e-5
#: How a forward of the installed transformers calls its cache.
CACHE = (
    "cache"
    if "cache" in inspect.signature(modelling("llama").LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
#: What ``check`` runs with a model, and a patch of one model or of all.
Action = Callable[[Any], Any]
Fused = Callable[[Any], AbstractContextManager[None]]

_WINDOW: dict[str, Any] = {"sliding_window": 8}
_SLIDING: dict[str, Any] = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "cohere2": {**_SLIDING, "logit_scale": 0.5},
    "gemma2": {**_SLIDING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gpt_oss": _SLIDING,
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "mistral": _WINDOW,
}


def has_kernel() -> bool:
    """Whether ``fused`` patches whole tokens here; otherwise nothing is replayed."""
    chosen = INCLUDE if INCLUDE == "auto" else tuple(INCLUDE.split(","))
    try:
        return OP in registry.select(chosen)
    except ValueError:
        return False


def build(name: str = "llama", **changes: Any) -> Any:
    """A tiny model in evaluation mode, always with the same weights, that no token ends.

    Its matrices are large enough for random weights to generate many different tokens.
    """
    own = {"initializer_range": 0.2, "tie_word_embeddings": False, **_OWN.get(name, {})}
    model = tiny_model(name, **{**own, **changes}).to(DEVICE).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """(batch, length) random tokens, none of them special."""
    return tokens(batch, length, seed).clamp_min(3).to(DEVICE)


def padded(batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """A batch of prompts of different lengths, filled from the left."""
    found = ids(batch, length)
    mask = torch.ones_like(found)
    for row in range(batch):
        found[row, : 2 * row] = mask[row, : 2 * row] = 0
    return {"input_ids": found, "attention_mask": mask}


def generate(model: Any, inputs: Any = None, **options: Any) -> Any:
    """Greedy generation of twelve tokens, with logits and the cache, unless options differ."""
    given = (
        inputs if isinstance(inputs, dict) else {"input_ids": ids() if inputs is None else inputs}
    )
    if "attention_mask" not in given and "input_ids" in given:
        given = {**given, "attention_mask": torch.ones_like(given["input_ids"])}
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }
    return model.generate(**given, **options)


def cache_of(output: ModelOutput) -> Any:
    """The cache in what a forward or ``generate`` has returned, whatever it is called."""
    names = [name for name in ("cache", "past_key_values") if name in output]
    return output[names[0]]


def step(model: Any, token: torch.Tensor, cache: Any, **options: Any) -> Any:
    """One forward with a cache."""
    return model(token, **{CACHE: cache}, **options)


def following(output: Any) -> torch.Tensor:
    """The most likely next token of each sequence, (batch, 1)."""
    return output.logits[:, -1:].argmax(-1)


def decode(
    model: Any,
    token: torch.Tensor | None = None,
    cache: Any = None,
    steps: int = 8,
    each: Callable[[int, Any], Any] = lambda place, cache: None,
    **options: Any,
) -> tuple[list[torch.Tensor], Any]:
    """A plain loop: the logits of every forward, and the cache. ``each`` runs after a forward.

    The first forward takes ``token``, a prompt if it is not given.
    """
    found, token = [], ids() if token is None else token
    for place in range(steps):
        output = step(model, token, cache, **options)
        cache, token = cache_of(output), following(output)
        found.append(output.logits)
        each(place, cache)
    return found, cache


def started(model: Any, steps: int = 6, **options: Any) -> tuple[torch.Tensor, Any]:
    """The next token, and a cache that a prompt and some tokens have gone into."""
    logits, cache = decode(model, steps=steps, **options)
    return logits[-1][:, -1:].argmax(-1), cache


def contents(cache: Any) -> list[dict[str, Any]]:
    """What a cache holds now, copied, layer by layer."""
    return [
        {
            "class": type(layer).__name__,
            "length": int(layer.get_seq_length()),
            "keys": layer.keys.clone(),
            "values": layer.values.clone(),
        }
        for layer in cache.layers
    ]


def empty_cache(model: Any, configured: bool = True) -> Any:
    """A DynamicCache as a user makes one, with the model's config or without."""
    return DynamicCache(config=model.config) if configured else DynamicCache()


@contextmanager
def everywhere(model: Any = None) -> Iterator[None]:
    """All models are patched."""
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(INCLUDE):
        yield


@contextmanager
def alone(model: Any) -> Iterator[None]:
    """One model is patched."""
    hf_kernel_patch.count_calls()
    hf_kernel_patch.apply_default_kernels(model, INCLUDE)
    try:
        yield
    finally:
        hf_kernel_patch.unpatch(model)


def replayed(report: Any) -> int:
    """Calls of a causal model's forward that replayed a whole token, while they were counted."""
    rows = [row for row in report if row.op == OP]
    return sum(n for row in rows for call, n in row.calls.items() if call.how is How.REPLAYED)


def reasons(report: Any) -> set[str]:
    """Why calls of a causal model's forward were not replayed."""
    return {call.reason for row in report if row.op == OP for call in row.calls if call.reason}


def check(
    action: Action,
    fused: Fused,
    name: str = "llama",
    replays: bool | None = True,
    grad: bool = False,
    **changes: Any,
) -> None:
    """The action gives the same with a patched model as with an equal one that is not patched.

    ``replays``: whether some token has to be replayed, or none; None where either is right.
    """
    with torch.set_grad_enabled(grad):
        expected = action(build(name, **changes))
        model = build(name, **changes)
        with fused(model):
            found = action(model)
            report = hf_kernel_patch.status()
            count, why = replayed(report), reasons(report)
    same(found, expected)
    if replays is not None:
        assert (count > 0) == (replays and has_kernel()), (count, why)


def same(found: Any, expected: Any, where: str = "result") -> None:
    """Both are of the same types down to the last member, integers equal and floats close."""
    assert type(found).__name__ == type(expected).__name__, where
    if isinstance(expected, torch.Tensor):
        _same_tensors(found, expected, where)
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), where
        for key in expected:
            same(found[key], expected[key], f"{where}.{key}")
        if isinstance(expected, ModelOutput):
            same(_fields(found), _fields(expected), f"{where} as attributes")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected)):
            same(one, other, f"{where}[{place}]")
    elif isinstance(expected, Cache | CacheLayerMixin) or type(expected).__name__.endswith("Cache"):
        same(_public(found), _public(expected), f"{where}: {type(expected).__name__}")
    elif isinstance(expected, bool | int | float | str | type | torch.dtype | torch.device):
        assert found == expected, f"{where}: {found} is not {expected}"


def _same_tensors(found: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    for trait in ("shape", "dtype", "device", "requires_grad"):
        assert getattr(found, trait) == getattr(expected, trait), f"{where}: {trait}"
    # What a cache holds may be a plain tensor under inference mode: it can do all that one can.
    assert expected.is_inference() or not found.is_inference(), f"{where}: inference"
    if not expected.is_floating_point():
        assert torch.equal(found, expected), f"{where}: {found} is not {expected}"
        return
    found, expected = found.detach(), expected.detach()
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite), f"{where}: infinite elsewhere"
    off = error(found[finite], expected[finite]) if finite.any() else 0.0
    limit = CLOSE if expected.dtype in (torch.float32, torch.float64) else 4e-2
    assert off <= limit, f"{where}: off by {off}"


def _public(thing: Any) -> dict[str, Any]:
    """Attributes that others may read, in a fixed order."""
    return {key: vars(thing)[key] for key in sorted(vars(thing)) if not key.startswith("_")}


def _fields(output: ModelOutput) -> dict[str, bool]:
    """Which fields of an output are None."""
    return {key: getattr(output, key) is None for key in output.__dataclass_fields__}
