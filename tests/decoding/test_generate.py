"""What can be asked of ``generate``, and is replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from tests.support.decoding import Fused, alone, build, check, generate, ids, padded

SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_k": 0},
    "repetition": {"repetition_penalty": 1.4},
    "no_repeats": {"no_repeat_ngram_size": 2},
    "several": {"num_return_sequences": 3},
    "scores": {"output_scores": True, "temperature": 0.8},
}
GREEDY: dict[str, dict[str, Any]] = {
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "max_length": {"max_new_tokens": None, "max_length": 18},
    "scores and logits": {"output_scores": True, "output_logits": True},
    "bad words": {"bad_words_ids": [[5], [7, 9]]},
    "forced end": {"forced_eos_token_id": 9},
    "penalty": {"repetition_penalty": 1.4},
    "bias": {"sequence_bias": {(5,): 3.0}},
}


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_sampling(options: dict[str, Any]) -> None:
    def run(model: Any) -> Any:
        torch.manual_seed(3)
        return generate(model, padded(), do_sample=True, **options)

    check(run, alone, "qwen3")


def test_sampling_in_all_models(fused: Fused) -> None:
    def run(model: Any) -> Any:
        torch.manual_seed(3)
        options = {"top_k": 20, "top_p": 0.9, "temperature": 1.3, "repetition_penalty": 1.1}
        return generate(model, padded(), do_sample=True, num_return_sequences=2, **options)

    check(run, fused)


@pytest.mark.parametrize("options", GREEDY.values(), ids=GREEDY)
def test_greedy_options(options: dict[str, Any]) -> None:
    few = options.get("max_new_tokens") in (1, 2)
    check(lambda model: generate(model, padded(), **options), alone, replays=None if few else True)


def test_tokens_alone(fused: Fused) -> None:
    """Without return_dict_in_generate the tokens are a tensor."""
    options = {"return_dict_in_generate": False, "output_logits": False}
    check(lambda model: generate(model, padded(), **options), fused)


@pytest.mark.parametrize("least", [0, 9])
def test_several_ends_of_which_rows_meet_different_ones(least: int) -> None:
    sequences = generate(build(), padded()).sequences
    ends = sorted({int(sequences[0, 12]), int(sequences[1, 15])})
    options = {"eos_token_id": ends, "min_new_tokens": least}
    check(lambda model: generate(model, padded(), **options), alone, replays=None)


class Kept(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.found.append(value.tolist())

    def end(self) -> None:
        self.found.append("end")


def test_a_streamer_gets_each_token(fused: Fused) -> None:
    def run(model: Any) -> Any:
        kept = Kept()
        return generate(model, ids(1), streamer=kept), kept.found

    check(run, fused)


class Seen(LogitsProcessor):
    """Keeps what it sees without a copy, and forbids the last token."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.found.append((input_ids, scores))
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class Wanted(StoppingCriteria):
    """Stops a row at an odd token after some steps, and keeps what it sees."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> Any:
        self.found.append((input_ids, scores))
        return (input_ids[:, -1] % 2 == 1) & (input_ids.shape[1] > 16)


def test_processors_and_criteria_of_a_user(fused: Fused) -> None:
    """What they kept without a copy is the same at the end too."""

    def run(model: Any) -> Any:
        seen, wanted = Seen(), Wanted()
        found = generate(
            model,
            padded(),
            output_scores=True,
            logits_processor=LogitsProcessorList([seen]),
            stopping_criteria=StoppingCriteriaList([wanted]),
        )
        return found, seen.found, wanted.found

    check(run, fused)


def test_a_processor_that_writes_into_the_scores() -> None:
    class Writes(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.mul_(-1.0)

    processors = LogitsProcessorList([Writes()])
    check(lambda model: generate(model, logits_processor=processors), alone)


def test_prompts_of_all_sizes_one_after_the_other(fused: Fused) -> None:
    def run(model: Any) -> Any:
        return [
            generate(model, ids(batch, length), max_new_tokens=7)
            for batch, length in [(1, 3), (4, 3), (1, 30), (2, 1), (4, 5), (1, 4)]
        ]

    check(run, fused)


def test_embeddings_as_a_prompt() -> None:
    def run(model: Any) -> Any:
        return generate(model, {"inputs_embeds": model.get_input_embeddings()(ids())})

    check(run, alone)


def test_a_row_that_is_nearly_all_padding() -> None:
    """A row whose mask leaves one token only."""

    def run(model: Any) -> Any:
        inputs = padded(2)
        inputs["attention_mask"][1, :-1] = 0
        return generate(model, inputs)

    check(run, alone)


def test_many_tokens_after_an_end() -> None:
    """Rows that have ended go on as padding."""
    first = int(generate(build(), padded()).sequences[0, 10])
    options = {"eos_token_id": first, "max_new_tokens": 20}
    check(lambda model: generate(model, padded(), **options), alone, replays=None)
