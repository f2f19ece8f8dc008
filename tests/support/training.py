"""Some steps of the real Trainer on a tiny model, and whether two such runs agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_kernel_patch
from tests.support.dataset import Rows
from tests.support.tiny import error, tiny_model


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
