"""``KernelPatchCallback(report=True)``: what the Trainer's log has of a patched training."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import hf_kernel_patch
from hf_kernel_patch import KernelPatchCallback, KernelUnavailableError
from hf_kernel_patch.ops.linear_cross_entropy.reference import measured
from hf_kernel_patch.recognition import site
from tests.support.probes import logits
from tests.support.tiny import tiny_model
from tests.support.training import agree, train

LOSS = "linear_cross_entropy"
OURS = {"kernel_calls_served", "kernel_calls_fallback", "token_accuracy", "mean_entropy"}


class Writer(TrainerCallback):
    """As TensorBoard's, which comes before the callbacks of users: keeps what it is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.hooks = 0

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.hooks = len(model._forward_hooks)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))


def of_training(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [row for row in log if "loss" in row]


def without_ours(run: Any) -> Any:
    log, weights = run
    return [{k: v for k, v in row.items() if k not in OURS} for row in log], weights


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "mixed-precision", "accumulation"],
)
def test_calls_and_metrics_are_in_the_log_of_each_step(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer, callback = Writer(), KernelPatchCallback(f"{LOSS},rms_norm", report=True)
    with caplog.at_level(logging.INFO, "hf_kernel_patch"):
        ours = train(tmp_path / "ours", None, [writer, callback], **options)
    log = of_training(ours[0])
    assert len(log) == 4
    forwards = options.get("gradient_accumulation_steps", 1)
    for row, written in zip(log, of_training(writer.logs), strict=True):
        assert set(row) >= OURS
        assert {name: written[name] for name in OURS} == {name: row[name] for name in OURS}
        # The loss and five norms, and none of the evaluations in between.
        assert (row["kernel_calls_served"], row["kernel_calls_fallback"]) == (6 * forwards, 0)
        assert 0 <= row["token_accuracy"] <= 1 and 4 < row["mean_entropy"] < 5
    assert not any(OURS & set(row) for row in ours[0] if "loss" not in row)
    agree(without_ours(ours), train(tmp_path / "eager", None, **options), 1e-3)
    assert writer.hooks == 1
    assert not site.counting and not hf_kernel_patch.status().rows
    assert {row.op: row.served for row in callback.report}[LOSS] == 4 * forwards
    assert f"1 modules of one model; {4 * forwards} calls served" in caplog.text


class Batches(TrainerCallback):
    """Keeps what the model is called with."""

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        hook = lambda module, arguments, given: self.seen.append(dict(given))  # noqa: E731
        model.register_forward_pre_hook(hook, with_kwargs=True)


def test_the_metrics_are_those_of_the_logits(tmp_path: Path) -> None:
    batches = Batches()
    log, _ = train(tmp_path, None, [batches, KernelPatchCallback(LOSS, report=True)])
    ids, labels = (batches.seen[0][name] for name in ("input_ids", "labels"))
    eager = tiny_model("llama").train()(ids).logits[:, :-1].flatten(0, 1)
    expected = measured(eager, labels[:, 1:].flatten(), -100)
    found = [log[0][name] for name in ("token_accuracy", "mean_entropy")]
    assert found == pytest.approx([float(one) for one in expected], abs=1e-5)


@pytest.mark.parametrize(
    ("include", "options", "names"),
    [
        ("rms_norm", None, {"kernel_calls_served", "kernel_calls_fallback"}),
        (
            LOSS,
            {LOSS: {"metrics": False}},
            {"kernel_calls_served", "kernel_calls_fallback"},
        ),
        (f"torch_fused_{LOSS}", f"{LOSS}.exact=1", OURS),
    ],
)
def test_metrics_need_the_fused_loss_and_may_be_switched_off(
    include: str, options: Any, names: set[str], tmp_path: Path
) -> None:
    callback = KernelPatchCallback(include, options=options, report=True)
    for row in of_training(train(tmp_path, None, [callback])[0]):
        assert OURS & set(row) == names
        assert row["kernel_calls_served"] > 0


def test_counting_stays_on_where_it_was(tmp_path: Path) -> None:
    hf_kernel_patch.count_calls()
    train(tmp_path, None, [KernelPatchCallback("rms_norm", report=True)])
    assert site.counting


class Stops(TrainerCallback):
    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.model = model
        raise RuntimeError("no further")


def test_after_an_exception_a_model_that_is_given_back_is_no_longer_watched(
    tmp_path: Path,
) -> None:
    stops = Stops()
    with pytest.raises(RuntimeError, match="no further"):
        train(tmp_path, None, [KernelPatchCallback("rms_norm", report=True), stops])
    assert site.counting and stops.model._forward_hooks
    hf_kernel_patch.unpatch(stops.model)
    logits(stops.model)
    assert not site.counting and not stops.model._forward_hooks


def test_without_report_the_log_is_the_original_s(tmp_path: Path) -> None:
    callback = KernelPatchCallback("rms_norm")
    assert not any(OURS & set(row) for row in train(tmp_path, None, [callback])[0])
    assert [row.op for row in callback.report] == ["rms_norm"]
    assert "no model was patched" in str(KernelPatchCallback("rms_norm").report)


def test_exclude_leaves_sites_out(tmp_path: Path) -> None:
    callback = KernelPatchCallback("rms_norm,swiglu", exclude="*.LlamaMLP.forward")
    train(tmp_path, None, [callback])
    found = {row.op: row.outcome for row in callback.report}
    assert found == {"rms_norm": "patched", "swiglu": "skipped"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"include": "nope"}, ValueError, "unknown kernel id or op 'nope'"),
        ({"exclude": "ropee"}, ValueError, "did you mean 'rope'"),
        ({"options": {LOSS: {"metric": 1}}, "include": LOSS}, ValueError, "'metrics'"),
        ({"options": 3}, TypeError, "options"),
        ({"include": "npu_fused_rope"}, KernelUnavailableError, "no npu device"),
        ({"config": {"include_kernels": "nope"}}, ValueError, "'nope'"),
        ({"report": 1}, TypeError, "report is True or False, not 1"),
    ],
)
def test_a_mistake_is_told_where_the_callback_is_made(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        KernelPatchCallback(**arguments)


def test_copies_report_nothing_of_the_original(tmp_path: Path) -> None:
    callback = KernelPatchCallback("rms_norm", report=True)
    train(tmp_path / "first", None, [callback])
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert not twin.report.rows
        log = of_training(train(tmp_path / str(id(twin)), None, [twin])[0])
        assert log[0]["kernel_calls_served"] == 5
