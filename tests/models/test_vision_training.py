"""Models that see, fine-tuned by the Trainer on images from their processors, patched and not."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

import hf_kernel_patch
from hf_kernel_patch.patching.report import PatchReport
from tests.families.run import FLOOR, kernels
from tests.models import vision
from tests.support.probes import fallbacks
from tests.support.tiny import TRANSFORMERS_5

LOSS = "linear_cross_entropy"
STEPS = 3
#: Transformers 4 logs four decimals of a loss, of which the last may be rounded either way.
LOGGED = 0.0 if TRANSFORMERS_5 else 1.01e-4
#: Model -> the families whose code it runs.
FAMILIES = {"qwen2_5_vl": "qwen2_5_vl,qwen2", "gemma3": "gemma3", "llava": "llava,llama"}
#: Model -> op -> calls of a step: of two layers of text, and of Qwen's two of vision.
SERVED = {
    "qwen2_5_vl": {"rms_norm": 6, "add_rms_norm": 4, "rope": 4, "swiglu": 4, LOSS: 1},
    "gemma3": {"rms_norm": 8, "add_rms_norm": 2, "qk_norm_rope": 2, "swiglu": 2, LOSS: 1},
    "llava": {"rms_norm": 3, "add_rms_norm": 2, "rope": 2, "swiglu": 2, LOSS: 1},
}
#: Where the memory of the loss is measured.
VOCABULARY, ROWS, WORDS, IMAGES = 4096, 32, 250, 2
#: Options of the loss -> how many times less memory its logits take than the original's, at least:
#: 8 and 50 times alone; of the second 21 once, beside other tests, for a reason not found.
SAVING: list[tuple[dict[str, Any], float]] = [({}, 6.0), ({"memory_mib": 4}, 15.0)]


def train(
    model: Any, name: str, rows: list[dict[str, Any]], batch: int, folder: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of every step over the rows, and what training has added to every weight."""
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        max_steps=len(rows) // batch,
        learning_rate=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        optim="sgd",  # as Adam makes a step of any gradient, however small
        max_grad_norm=0.0,  # as dividing by one norm would hide a factor of all gradients
        seed=3,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=vision.collator(name))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, {key: p.detach() - before[key] for key, p in model.named_parameters()}


def calls(report: PatchReport) -> Counter[str]:
    """Op -> calls that it served."""
    found: Counter[str] = Counter()
    for row in report:
        found[row.op] += row.served
    return +found


def writes_its_own_loss(name: str) -> bool:
    """Whether its loss drops logits by the attention mask: Gemma 3, transformers <= 5.5."""
    return "shift_attention_mask" in inspect.getsource(type(vision.model(name)).forward)


@pytest.mark.versions
@pytest.mark.parametrize("name", vision.KINDS)
def test_fine_tuning_on_images_gives_the_same_losses_and_weights(name: str, tmp_path: Path) -> None:
    rows = vision.conversations(2 * STEPS)
    expected = Counter({op: count * STEPS for op, count in SERVED[name].items()})
    if writes_its_own_loss(name):
        del expected[LOSS]  # which is known with a mask in its labels alone
    losses, changes = train(vision.model(name), name, rows, 2, tmp_path)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(kernels(), models=FAMILIES[name], strict=True) as report:
        ours, our_changes = train(vision.model(name), name, rows, 2, tmp_path)
    assert len(losses) == STEPS and len(set(losses)) == STEPS
    assert ours == pytest.approx(losses, rel=1e-5, abs=LOGGED)
    assert any(change.any() for key, change in changes.items() if "patch_embed" in key)
    total = float(torch.stack([change.norm() for change in changes.values()]).norm())
    for key, change in changes.items():
        away = float((our_changes[key] - change).norm())
        assert away <= 5e-5 * float(change.norm()) + FLOOR * total, key
    assert calls(report) == expected
    assert fallbacks(report) == Counter()


class Logits(TorchDispatchMode):
    """Bytes of the tensors that a program makes as wide as the vocabulary: logits and the like.

    What an operator allocates inside and frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        found = function(*arguments, **(options or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return found

    def _count(self, tensor: torch.Tensor) -> None:
        # The head's weight and its gradient are as wide when they are turned round.
        if tensor.shape[-1:] != (VOCABULARY,) or not tensor.is_contiguous():
            return
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage)
        weakref.finalize(storage, self._free, size)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def _free(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize("name", vision.KINDS)
def test_logits_of_a_training_step_take_a_fraction_of_the_memory(name: str, tmp_path: Path) -> None:
    if writes_its_own_loss(name):
        pytest.skip("its loss drops logits by the attention mask, and is not patched")
    rows = vision.conversations(ROWS, WORDS, IMAGES)
    tokens = vision.collator(name)(rows)["input_ids"].numel()

    def measure() -> tuple[float, Logits]:
        model = vision.model(name, VOCABULARY)
        with Logits() as logits:
            (loss,), _ = train(model, name, rows, ROWS, tmp_path)
        assert logits.live == 0
        return loss, logits

    loss, eager = measure()
    assert eager.largest == tokens * VOCABULARY * 4
    assert eager.peak >= 2 * eager.largest  # its logits are kept for what backward makes of them
    for options, times in SAVING:
        hf_kernel_patch.count_calls()
        with hf_kernel_patch.patched(
            kernels(), models=FAMILIES[name], strict=True, options={LOSS: options}
        ) as report:
            our_loss, ours = measure()
        assert calls(report)[LOSS] == 1
        assert our_loss == pytest.approx(loss, rel=1e-5, abs=LOGGED)
        assert 0 < ours.peak <= eager.peak / times, (ours.peak, eager.peak)
