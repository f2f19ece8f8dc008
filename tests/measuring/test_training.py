"""A real model that trains: what costs time is thrown out, what saves some is kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_kernel_patch
from hf_kernel_patch.measuring import measurement
from tests.measuring.worlds import (
    Clock,
    Training,
    hooks_left,
    kernels,
    measured,
    steps_until_chosen,
)
from tests.support.dataset import Rows
from tests.support.probes import served
from tests.support.tiny import tiny_model, tokens

OTHERS = "swiglu,add_rms_norm,linear_cross_entropy,moe,qk_norm_rope"


def patched(**changes: Any) -> hf_kernel_patch.patched:
    return hf_kernel_patch.patched("measured", models="llama", **{"exclude": OTHERS, **changes})


def test_a_slow_kernel_is_out_and_a_fast_one_is_in(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    with kernels(clock, rms_norm=0.1, rope=-0.1), patched() as report:
        steps_until_chosen(training.step, report)
        assert "left out, 62.5% slower with it" in measured(report)["rms_norm"]
        assert (
            "20.0% faster with it (LlamaForCausalLM, cpu, training; measured now)"
            in (measured(report)["rope"])
        )
        hf_kernel_patch.count_calls()
        begun = clock.now
        training.step()
        assert clock.now == pytest.approx(begun + 1 - 2 * 0.1)  # one call a layer
        for row in report.patched:
            if row.op == "rms_norm":
                assert row.served == 0
                (reason,) = row.fallbacks
                assert "slower with it (LlamaForCausalLM, cpu, training)" in reason
            else:
                assert (row.served, row.fallbacks) == (2, {})


def test_with_everything_slow_all_is_out(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    with kernels(clock, rms_norm=0.02, rope=0.02), patched(exclude=()) as report:
        steps_until_chosen(training.step, report)
        begun = clock.now
        training.step()
        assert clock.now == begun + 1
        hf_kernel_patch.count_calls()
        training.step()
        assert served(report) == 0


def test_a_kernel_that_really_sleeps_is_out() -> None:
    """By the clock of the machine: a sleep that is long beside a step of this model."""
    assert measurement.clock is time.perf_counter
    training = Training(tiny_model("llama", num_hidden_layers=1), Clock())
    with kernels(rms_norm=0.04), patched(exclude=f"{OTHERS},rope") as report:
        steps_until_chosen(training.step, report)
        assert "left out" in measured(report)["rms_norm"]


def test_losses_and_gradients_are_those_of_auto_while_it_measures(clock: Clock) -> None:
    def run(include: str) -> list[float]:
        training = Training(tiny_model("llama"), clock)
        with hf_kernel_patch.patched(include, models="llama"):
            return [float(training.step()) for _ in range(100)]

    assert run("measured") == pytest.approx(run("auto"), rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_are_computed_as_the_first_time(
    clock: Clock, reentrant: bool
) -> None:
    """Else torch raises, or gradients are of something else than the loss."""
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    training = Training(model, clock)
    with kernels(clock, rms_norm=-0.01, rope=0.1), patched(exclude=()) as report:
        steps_until_chosen(training.step, report)
        assert "left out" in measured(report)["rope"]
        assert "faster" in measured(report)["rms_norm"]


def test_an_optimizer_that_steps_within_the_backward(clock: Clock) -> None:
    """One for each weight, which is how memory of gradients is saved, with recomputation."""
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for weight in model.parameters():
        own = torch.optim.SGD([weight], 1e-3)

        def step(held: torch.Tensor, own: Any = own) -> None:
            own.step()
            own.zero_grad()

        weight.register_post_accumulate_grad_hook(step)

    def whole_step() -> None:
        clock.now += 1
        model(input_ids=tokens(), labels=tokens()).loss.backward()

    with kernels(clock, rms_norm=-0.01, rope=0.1), patched(exclude=()) as report:
        steps_until_chosen(whole_step, report)
        assert "left out" in measured(report)["rope"]
        assert "faster" in measured(report)["rms_norm"]


def test_gradients_of_several_batches_are_one_step(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    real, calls = training.optimizer.step, []

    def every_other(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) % 2 == 0:
            real(*arguments)

    training.optimizer.step = every_other
    with kernels(clock, rms_norm=0.1, rope=-0.1), patched() as report:
        steps_until_chosen(training.step, report)
        assert "left out" in measured(report)["rms_norm"]
        assert len(calls) > 80


def test_batches_of_many_lengths(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    lengths = [10, 12, 17, 40, 11] * 100
    real = [tokens(2, length) for length in lengths]
    with kernels(clock, rms_norm=0.1, rope=-0.05), patched() as report:
        steps_until_chosen(lambda: training.step(real.pop()), report)
        assert "left out" in measured(report)["rms_norm"]
        assert "left out" not in measured(report)["rope"]


def test_evaluations_between_steps_are_not_timed_with_them(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    steps: list[int] = []

    def step() -> None:
        training.step()
        steps.append(1)
        if len(steps) % 3 == 0:
            training.model.eval()
            with torch.no_grad():
                training.model(tokens())
            clock.now += 1000
            training.model.train()

    with kernels(clock, rms_norm=0.02, rope=-0.02), patched() as report:
        for _ in range(200):
            step()
        assert "left out, 10.4% slower with it" in measured(report)["rms_norm"]


def test_two_models_that_train_in_turns_get_a_choice_each(clock: Clock) -> None:
    first = Training(tiny_model("llama"), clock)
    second = Training(tiny_model("llama", num_hidden_layers=1), clock)

    def both() -> None:
        first.step()
        second.step()

    with kernels(clock, rms_norm=0.1, rope=-0.1), patched() as report:
        steps_until_chosen(both, report)
        text = measured(report)["rms_norm"]
        assert text.count("left out") == 2  # other shapes, and so other shares of a step
        hf_kernel_patch.count_calls()
        both()
        assert all(row.served == 0 for row in report.patched if row.op == "rms_norm")


def test_two_models_of_one_optimizer(clock: Clock) -> None:
    models = [tiny_model("llama"), tiny_model("llama", num_hidden_layers=1)]
    weights = [one for model in models for one in model.parameters()]
    optimizer = torch.optim.SGD(weights, 1e-3)

    def step() -> None:
        clock.now += 1
        for model in models:
            model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()

    with kernels(clock, rms_norm=0.1, rope=-0.1), patched() as report:
        steps_until_chosen(step, report)
        assert measured(report)["rms_norm"].count("left out") == 2


def test_a_second_model_of_the_same_shapes_takes_the_first_one_s_choice(clock: Clock) -> None:
    with kernels(clock, rms_norm=0.1, rope=-0.1), patched() as report:
        first = Training(tiny_model("llama"), clock)
        steps_until_chosen(first.step, report)
        second = Training(tiny_model("llama"), clock)
        begun = clock.now
        second.step()
        assert clock.now == pytest.approx(begun + 1 - 2 * 0.1)


def test_a_frozen_teacher_beside_the_model_that_trains(clock: Clock) -> None:
    teacher = tiny_model("llama", num_hidden_layers=1).eval()
    training = Training(tiny_model("llama"), clock)

    def step() -> None:
        with torch.no_grad():
            teacher(tokens())
        clock.now += 1
        training.step()

    with kernels(clock, rms_norm=0.1, rope=-0.1), patched() as report:
        for _ in range(200):
            step()
        text = measured(report)["rms_norm"]
        assert "left out, 62.5% slower with it (LlamaForCausalLM, cpu, training" not in text
        assert "slower with it (LlamaForCausalLM, cpu, training" in text
        assert "slower with it (LlamaForCausalLM, cpu, inference" in text


def test_an_optimizer_with_copies_of_the_weights(clock: Clock) -> None:
    """As DeepSpeed's: after a few steps it is taken for the model's."""
    model = tiny_model("llama")
    copies = [nn.Parameter(one.detach().clone()) for one in model.parameters()]
    training = Training(model, clock, torch.optim.SGD(copies, 1e-3))
    with kernels(clock, rms_norm=0.1, rope=-0.1), patched() as report:
        steps_until_chosen(training.step, report)
        assert "left out" in measured(report)["rms_norm"]


def test_a_second_optimizer_after_the_first_is_gone(clock: Clock) -> None:
    training = Training(tiny_model("llama"), clock)
    with kernels(clock, rms_norm=0.1, rope=-0.1), patched() as report:
        for _ in range(20):
            training.step()
        training = Training(training.model, clock)
        steps_until_chosen(training.step, report)
        assert "left out" in measured(report)["rms_norm"]


def test_a_model_without_an_optimizer_stays_as_auto_has_it(clock: Clock) -> None:
    model = tiny_model("llama").train()
    with kernels(clock, rms_norm=0.1, rope=-0.1), patched() as report:
        for _ in range(20):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert "no step is timed yet, it is as auto has it" in measured(report)["rms_norm"]
        hf_kernel_patch.count_calls()
        model(input_ids=tokens())
        assert {row.op for row in report.patched if row.served} == {"rms_norm", "rope"}


class Timed(Trainer):
    """The real one, whose steps take a second each."""

    clock: Clock

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        loss = super().training_step(*arguments, **named)
        self.clock.now += 1
        return loss


@pytest.mark.versions
@pytest.mark.parametrize("scope", ["all models", "one model"])
def test_the_trainer(clock: Clock, tmp_path: Path, scope: str) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        max_steps=80,
        eval_strategy="steps",
        eval_steps=7,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    model = tiny_model("llama")
    with kernels(clock, rms_norm=0.1, rope=-0.1):
        callback = None
        if scope == "one model":
            callback = hf_kernel_patch.KernelPatchCallback("measured", exclude=OTHERS)
        else:
            hf_kernel_patch.patch_transformers("measured", models="llama", exclude=OTHERS)
        trainer = Timed(
            model,
            arguments,
            train_dataset=Rows(),
            eval_dataset=Rows(),
            callbacks=[callback] if callback else None,
        )
        trainer.clock = clock
        report = callback.report if callback else hf_kernel_patch.status()
        trainer.train()
        text = measured(report)
        assert "slower with it (LlamaForCausalLM, cpu, training; measured now)" in text["rms_norm"]
        assert "faster with it (LlamaForCausalLM, cpu, training; measured now)" in text["rope"]
        hf_kernel_patch.unpatch()
    assert not hooks_left()
