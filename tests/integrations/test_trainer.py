"""The real Trainer, patched and not: the same losses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional
from transformers import Trainer, TrainerCallback

import hf_kernel_patch
from hf_kernel_patch import KernelPatchCallback, KernelPatchWarning
from tests.support.training import agree, train

LOSS = "linear_cross_entropy"
LAYERS = "rms_norm,rope,swiglu"


@pytest.mark.parametrize("steps", [1, 4])
def test_accumulation_evaluation_saving_and_resuming_give_the_same(
    steps: int, tmp_path: Path
) -> None:
    options = {"gradient_accumulation_steps": steps}
    runs = {}
    for name, include in {"eager": None, "ours": f"{LOSS},{LAYERS}"}.items():
        whole = train(tmp_path / name, include, **options)
        saved = str(tmp_path / name / "checkpoint-2")
        runs[name] = whole, train(tmp_path / name, include, resume=saved, **options)
    for ours, eager in zip(runs["ours"], runs["eager"], strict=True):
        agree(ours, eager)
    assert {"loss", "eval_loss", "eval_right"} <= {name for row in ours[0] for name in row}


def test_mixed_precision_gives_the_same(tmp_path: Path) -> None:
    eager = train(tmp_path / "eager", None, bf16=True)
    ours = train(tmp_path / "ours", LOSS, bf16=True)
    agree(ours, eager, 1e-3)


def test_label_smoothing_and_a_loss_of_one_s_own_see_logits(tmp_path: Path) -> None:
    eager = train(tmp_path / "eager", None, label_smoothing_factor=0.1)
    agree(train(tmp_path / "ours", LOSS, label_smoothing_factor=0.1), eager)


def twice(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return 2 * functional.cross_entropy(logits, targets)


class OfLogits(Trainer):
    """Adds to the model's loss something of its logits, as distillation does."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        loss = loss + outputs.logits.float().logsumexp(-1).square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("own", [{"loss": twice}, {"kind": OfLogits}], ids=["func", "method"])
def test_a_loss_of_the_user_s_reads_the_logits(own: dict[str, Any], tmp_path: Path) -> None:
    agree(train(tmp_path / "ours", LOSS, **own), train(tmp_path / "eager", None, **own))


class Watch(hf_kernel_patch.KernelPatchCallback):
    """Remembers what was patched when training began."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.rows = hf_kernel_patch.status().rows


def test_the_callback_patches_the_trainer_s_model_until_the_end(tmp_path: Path) -> None:
    eager = train(tmp_path / "eager", None)
    hf_kernel_patch.count_calls()
    watch = Watch(f"{LOSS},{LAYERS}")
    ours = train(tmp_path / "ours", None, [watch])
    agree(ours, eager)
    assert {row.op for row in watch.rows} == {LOSS, *LAYERS.split(",")}
    assert all(row.scope == "model" for row in watch.rows)
    assert {row.op: row.served for row in watch.rows}[LOSS] == 4
    assert not hf_kernel_patch.status().rows


def test_the_callback_serves_under_mixed_precision(tmp_path: Path) -> None:
    hf_kernel_patch.count_calls()
    watch = Watch(LOSS)
    with warnings.catch_warnings():  # accelerate's forward for it calls ours, so none is due
        warnings.simplefilter("error", KernelPatchWarning)
        ours = train(tmp_path / "ours", None, [watch], bf16=True)
    assert [(row.served, row.outcome) for row in watch.rows] == [(4, "patched")]
    agree(ours, train(tmp_path / "eager", None, bf16=True), 1e-3)


def test_the_callback_leaves_what_else_is_patched(tmp_path: Path) -> None:
    hf_kernel_patch.count_calls()
    watches = [Watch(LOSS), Watch("swiglu")]
    made: list[Any] = []

    class First(Watch):
        def on_init_end(self, *_: Any, model: Any, **__: Any) -> None:
            made.append(hf_kernel_patch.apply_kernel("torch_fused_rmsnorm", model=model))

    train(tmp_path / "ours", None, [First(None), *watches])
    for watch in watches:
        assert {row.op for row in watch.rows} == {"rms_norm", LOSS, "swiglu"}
        assert all(row.served for row in watch.rows)
    assert {row.op for row in hf_kernel_patch.status().rows} == {"rms_norm"}
    hf_kernel_patch.unpatch(made[0])


class Stops(TrainerCallback):
    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.model = model
        raise RuntimeError("no further")


def test_after_an_exception_unpatch_gives_the_model_back(tmp_path: Path) -> None:
    stops = Stops()
    with pytest.raises(RuntimeError, match="no further"):
        train(tmp_path / "ours", None, [KernelPatchCallback(LOSS), stops])
    assert hf_kernel_patch.status().rows
    hf_kernel_patch.unpatch(stops.model)
    assert not hf_kernel_patch.status().rows


def test_the_callback_tells_a_mistake_at_once() -> None:
    assert hf_kernel_patch.KernelPatchCallback is KernelPatchCallback
    with pytest.raises(TypeError, match="include"):
        KernelPatchCallback(include=3)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_kernel_patch.nothing  # noqa: B018
