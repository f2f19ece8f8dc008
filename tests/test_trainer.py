"""The real Trainer, patched and not: the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_kernel_patch
from hf_kernel_patch import KernelPatchCallback
from tests.support.dataset import Rows
from tests.support.tiny import error, tiny_model

LOSS = "linear_cross_entropy"
LAYERS = "rms_norm,rope,swiglu"


def train(
    folder: Path,
    include: str | None,
    callbacks: list[Any] | None = None,
    resume: str | None = None,
    dtype: torch.dtype = torch.float32,
    kind: type[Trainer] = Trainer,
    loss: Any = None,
    **options: Any,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Log and weights of some steps of training, with evaluations and saved states."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        optim="sgd",  # as Adam makes a step of any gradient, however small
        seed=3,
        disable_tqdm=True,
        **options,
    )
    shapes = []

    def compute_metrics(found: Any) -> dict[str, float]:
        shapes.append(found.predictions.shape)
        return {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    with hf_kernel_patch.patched(include, models="llama"):
        trainer = kind(
            tiny_model("llama", dtype),
            arguments,
            train_dataset=Rows(),
            eval_dataset=Rows(),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            compute_loss_func=loss,
        )
        trainer.train(resume_from_checkpoint=resume)
    assert set(shapes) == {(16, 12, 128)}
    timed = ("runtime", "per_second", "flos")
    log = [
        {k: v for k, v in row.items() if not any(word in k for word in timed)}
        for row in trainer.state.log_history
    ]
    return log, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def agree(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    assert [set(row) for row in ours[0]] == [set(row) for row in theirs[0]]
    for one, other in zip(ours[0], theirs[0], strict=True):
        for name in other:
            assert one[name] == pytest.approx(other[name], rel=100 * tolerance, abs=tolerance), name
    for name, weight in theirs[1].items():
        assert error(ours[1][name], weight) < 30 * tolerance, name


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
    ours = train(tmp_path / "ours", None, [watch], bf16=True)
    assert [row.served for row in watch.rows] == [4]
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
