"""Gradient modes, autocast, torch.compile, and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.support.decoding import (
    CACHE,
    DEVICE,
    Fused,
    alone,
    build,
    check,
    decode,
    everywhere,
    following,
    generate,
    ids,
    same,
    started,
    step,
)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_without_gradients(mode: Any, fused: Fused) -> None:
    def run(model: Any) -> Any:
        with mode():
            return decode(model)

    check(run, fused, grad=True)


def test_modes_in_turns() -> None:
    """A cache that was begun in one mode goes on in another."""

    def run(model: Any) -> Any:
        with torch.no_grad():
            token, cache = started(model)
        found = []
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.no_grad) * 2:
            with mode():
                output = step(model, token, cache)
                token = following(output).clone()
                found.append(output.logits.detach().clone())
        return found

    check(run, alone, grad=True, replays=None)


def gradients(model: Any) -> Any:
    model.zero_grad()
    with torch.no_grad():
        token, cache = started(model)
    logits, _ = decode(model, token, cache, 3)
    sum(one.square().mean() for one in logits).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return [one.detach() for one in logits], grads


def test_with_gradients(fused: Fused) -> None:
    def run(model: Any) -> Any:
        first = gradients(model)
        with torch.no_grad():
            between, _ = decode(model)
        return first, between, gradients(model)

    check(run, fused, grad=True)


def test_gradients_of_embeddings_alone() -> None:
    """Weights are frozen, what goes in is not."""

    def run(model: Any) -> Any:
        model.requires_grad_(False)
        with torch.no_grad():
            token, cache = started(model)
            embedded = model.get_input_embeddings()(token)
        embedded.requires_grad_()
        model(inputs_embeds=embedded, **{CACHE: cache}).logits.sum().backward()
        return embedded.grad

    check(run, alone, grad=True, replays=None)


def test_frozen_weights_without_no_grad() -> None:
    """Nothing asks for gradients though they are enabled."""

    def run(model: Any) -> Any:
        return decode(model.requires_grad_(False))

    check(run, alone, grad=True, replays=None)


def test_training_mode_without_gradients() -> None:
    def run(model: Any) -> Any:
        model.train()
        found = decode(model)
        model.eval()
        return found, decode(model)

    check(run, alone, attention_dropout=0.0)


def test_autocast_between() -> None:
    def run(model: Any) -> Any:
        first, _ = decode(model)
        with torch.autocast(DEVICE, torch.bfloat16):
            found, cache = decode(model, steps=1)
            for place in range(5):
                logits, cache = decode(model, ids(2, 1, seed=place), cache, 1)
                found += logits
        return first, found, decode(model)

    check(run, alone)


def test_compiled() -> None:
    """Compiled with a backend that runs what is traced, between tokens that are replayed."""

    def run(model: Any, compiled: Any) -> Any:
        first, cache = decode(model, steps=5)
        second, cache = decode(compiled, ids(2, 1), cache, 2)
        return first, second, decode(model, ids(2, 1), cache, 5)

    torch.compiler.reset()
    original, model = build(num_hidden_layers=1), build(num_hidden_layers=1)
    with torch.no_grad(), alone(model):
        found = run(model, torch.compile(model, backend="eager"))
        same(found, run(original, original))


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What jobs give that run in threads of their own at the same time."""
    found: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def work(place: int) -> None:
        barrier.wait()
        try:
            with torch.no_grad():
                found[place] = [jobs[place]() for _ in range(3)]
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_threads_with_one_model(fused: Fused) -> None:
    prompts = [ids(2, 9, seed=1), ids(2, 9, seed=2), ids(1, 5, seed=3)]
    model = build()
    expected = [[generate(build(), prompt)] * 3 for prompt in prompts]
    with fused(model):
        found = together([lambda prompt=prompt: generate(model, prompt) for prompt in prompts])
    same(found, expected)


def test_threads_with_two_models() -> None:
    models = [build("llama"), build("qwen3")]
    expected = [[generate(model)] * 3 for model in models]
    with everywhere():
        found = together([lambda model=model: generate(model) for model in models])
    same(found, expected)


def test_a_thread_that_ends_before_the_next_one_goes_on() -> None:
    """A cache that was begun in a thread goes on in another."""
    model = build()
    with torch.no_grad():
        expected = decode(build(), steps=6), decode(build(), ids(2, 1), decode(build(), steps=6)[1])
    with ExitStack() as stack:
        stack.enter_context(alone(model))
        caches: list[Any] = []
        thread = threading.Thread(
            target=lambda: torch.no_grad()(lambda: caches.append(decode(model, steps=6)))()
        )
        thread.start()
        thread.join()
        with torch.no_grad():
            found = decode(model, ids(2, 1), caches[0][1])
    same(found, expected[1])
    same(caches[0][0], expected[0][0])
