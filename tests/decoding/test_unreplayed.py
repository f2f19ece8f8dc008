"""Ways to generate that run as before, or in part, with the same result."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.support.decoding import Fused, alone, build, check, decode, generate, ids, padded, step

BEAMS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "early": {"num_beams": 2, "early_stopping": True, "eos_token_id": 9},
}


@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beams(name: str, options: dict[str, Any]) -> None:
    def run(model: Any) -> Any:
        torch.manual_seed(3)
        return generate(model, padded(), **options)

    check(run, alone, name, replays=None)


@pytest.mark.parametrize("sample", [False, True])
def test_an_assistant(sample: bool, fused: Fused) -> None:
    def run(model: Any) -> Any:
        torch.manual_seed(3)
        assistant = build(hidden_size=32, num_hidden_layers=1)
        return generate(model, ids(1), assistant_model=assistant, do_sample=sample)

    check(run, fused, replays=None)


def test_an_equal_assistant_whose_tokens_are_taken() -> None:
    check(lambda model: generate(model, ids(1), assistant_model=build()), alone, replays=None)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tokens_looked_up_in_the_prompt(name: str) -> None:
    prompt = ids(1, 6).repeat(1, 3)
    # Transformers 4 looks for the end among what it finds, and fails if there is none.
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 8, "eos_token_id": 1}
    check(lambda model: generate(model, prompt, **options), alone, name, replays=None)


@pytest.mark.skipif(
    not hasattr(GenerationConfig(), "prefill_chunk_size"), reason="no chunks in this version"
)
def test_a_prompt_in_chunks(fused: Fused) -> None:
    check(lambda model: generate(model, ids(), prefill_chunk_size=4), fused, replays=None)


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states"])
def test_more_outputs(option: str, fused: Fused) -> None:
    options = {option: True}
    check(
        lambda model: generate(model, **options), fused, replays=False, attn_implementation="eager"
    )


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states"])
def test_more_outputs_between_others(option: str) -> None:
    """In the call, and in the config after some tokens."""

    def run(model: Any) -> Any:
        logits, cache = decode(model)
        output = step(model, ids(2, 1), cache, **{option: True})
        setattr(model.config, option, True)
        again = step(model, ids(2, 1), cache)
        setattr(model.config, option, False)
        return logits, output, again, decode(model, ids(2, 1), cache)

    check(run, alone, attn_implementation="eager")


INNER = ["model.layers.1.self_attn.q_proj", "model.layers.0", "model.norm", "model", "lm_head", ""]


@pytest.mark.parametrize("where", INNER)
def test_a_hook_before_the_first_token(where: str) -> None:
    def run(model: Any) -> Any:
        calls: list[int] = []
        model.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
        return generate(model), len(calls)

    check(run, alone, replays=None if where == "" else False)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("where", INNER)
def test_a_hook_after_some_tokens_and_its_end(where: str, kind: str) -> None:
    def run(model: Any) -> Any:
        calls: list[int] = []
        logits, cache = decode(model)
        handle = getattr(model.get_submodule(where), kind)(lambda *_: calls.append(1))
        hooked, cache = decode(model, ids(2, 1), cache)
        seen = len(calls)
        handle.remove()
        return logits, hooked, seen, decode(model, ids(2, 1), cache), len(calls)

    check(run, alone)


def test_a_hook_that_changes_a_layer() -> None:
    def run(model: Any) -> Any:
        _, cache = decode(model)
        layer = model.model.layers[0].mlp
        layer.register_forward_hook(lambda module, given, output: output * 2)
        return decode(model, ids(2, 1), cache)

    check(run, alone)


def test_a_hook_for_all_modules(fused: Fused) -> None:
    def run(model: Any) -> Any:
        calls: list[str] = []
        logits, cache = decode(model)
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: calls.append(type(module).__name__)
        )
        try:
            return logits, decode(model, ids(2, 1), cache), calls
        finally:
            handle.remove()

    check(run, fused)


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static", "quantized"])
def test_other_caches(kind: str, fused: Fused) -> None:
    if kind.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("offloading needs a CUDA device")
    if kind == "quantized" and not (find_spec("hqq") or find_spec("optimum")):
        pytest.skip("needs hqq or optimum-quanto")
    options: dict[str, Any] = {"cache_implementation": kind}
    if "static" in kind:
        options["disable_compile"] = True
    check(lambda model: generate(model, **options), fused, replays=None)


def test_without_a_cache(fused: Fused) -> None:
    check(lambda model: generate(model, use_cache=False), fused, replays=False)


def test_tuples_instead_of_outputs() -> None:
    def run(model: Any) -> Any:
        found, cache = [], decode(model)[1]
        for place in range(4):
            found.append(step(model, ids(2, 1, seed=place), cache, return_dict=False)[0])
        return found, cache

    check(run, alone)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_logits_to_keep(keep: int) -> None:
    check(lambda model: decode(model, logits_to_keep=keep), alone, replays=None)
