"""Forwards without gradients: timed from one to the next, and decoding as "auto" has it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import hf_kernel_patch
from tests.measuring.worlds import Clock, Training, kernels, measured, steps_until_chosen
from tests.support.tiny import tiny_model, tokens

ONLY: dict[str, Any] = {
    "models": "llama",
    "exclude": "swiglu,add_rms_norm,linear_cross_entropy,qk_norm_rope",
}
WHERE = "(LlamaForCausalLM, cpu, inference; measured now)"


@pytest.fixture
def model() -> Any:
    return tiny_model("llama").eval()


def forward(model: Any, clock: Clock, ids: torch.Tensor | None = None) -> Any:
    with torch.no_grad():
        output = model(tokens() if ids is None else ids, use_cache=False)
    clock.now += 1
    return output


def test_a_slow_kernel_is_out_and_a_fast_one_is_in(clock: Clock, model: Any) -> None:
    with (
        kernels(clock, rms_norm=0.1, rope=-0.1),
        hf_kernel_patch.patched("measured", **ONLY) as report,
    ):
        steps = steps_until_chosen(lambda: forward(model, clock), report)
        assert steps < 100
        assert f"left out, 62.5% slower with it {WHERE}" in measured(report)["rms_norm"]
        assert f"20.0% faster with it {WHERE}" in measured(report)["rope"]
        begun = clock.now
        forward(model, clock)
        assert clock.now == pytest.approx(begun + 1 - 2 * 0.1)


def test_logits_are_those_of_the_original_all_the_time(clock: Clock, model: Any) -> None:
    expected = forward(model, clock).logits
    with hf_kernel_patch.patched("measured", models="llama"):
        for _ in range(80):
            torch.testing.assert_close(forward(model, clock).logits, expected)


def test_generation_is_timed_up_to_its_first_token(clock: Clock, model: Any) -> None:
    """A decoded token takes what it likes, and is served as auto serves it."""

    def generate() -> None:
        model.generate(tokens(), max_new_tokens=4, do_sample=False)
        clock.now += 1000

    with (
        kernels(clock, rms_norm=0.1, rope=0.001),
        hf_kernel_patch.patched("measured", **ONLY) as report,
    ):
        steps_until_chosen(generate, report)
        assert "left out" in measured(report)["rms_norm"]
        hf_kernel_patch.count_calls()
        generate()
        norms = {row.site: row for row in report.patched if row.op == "rms_norm"}
        (row,) = norms.values()
        assert row.served == 3 * 5  # the tokens after the first, which the prompt gives
        assert sum(row.fallbacks.values()) == 5


def test_two_threads_spoil_nothing(clock: Clock, model: Any) -> None:
    expected = forward(model, clock).logits
    wrong: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(40):
                torch.testing.assert_close(forward(model, clock).logits, expected)
        except Exception as error:
            wrong.append(error)

    with hf_kernel_patch.patched("measured", models="llama"):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_model_that_is_evaluated_and_then_trains_has_two_choices(
    clock: Clock, model: Any
) -> None:
    with (
        kernels(clock, rms_norm=0.1, rope=-0.1),
        hf_kernel_patch.patched("measured", **ONLY) as report,
    ):
        for _ in range(10):  # too few
            forward(model, clock)
        training = Training(model, clock)
        for _ in range(100):
            training.step()
        text = measured(report)["rms_norm"]
        assert "left out, 62.5% slower with it (LlamaForCausalLM, cpu, training" in text
        model.eval()
        for _ in range(100):
            forward(model, clock)
        assert f"left out, 62.5% slower with it {WHERE}" in measured(report)["rms_norm"]


def test_a_model_of_which_functions_alone_are_patched(clock: Clock) -> None:
    """A forward is one step, however many layers call the function; the mode is that of now."""
    model = tiny_model("gpt_neox").eval()
    training = Training(tiny_model("gpt_neox", num_hidden_layers=1), clock)
    wanted: dict[str, Any] = {"models": "gpt_neox", "exclude": "linear_cross_entropy"}
    with (
        kernels(clock, rope=0.1),
        hf_kernel_patch.patched("measured", **wanted) as report,
    ):
        for _ in range(5):
            forward(model, clock)
        assert "measured: 4 of at most" in measured(report)["rope"]
        steps_until_chosen(lambda: forward(model, clock), report)
        for _ in range(50):
            training.step()
        text = measured(report)["rope"]
        for mode in ("inference", "training"):
            assert f"slower with it (GPTNeoXForCausalLM, cpu, {mode}; measured now)" in text
