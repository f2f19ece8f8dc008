"""Run in two processes, patched from outside: the Trainer so, as it is, and by the callback."""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

import hf_kernel_patch
from tests.support.dataset import Rows
from tests.support.tiny import tiny_model

KERNELS = "torch_fused_rmsnorm,torch_fused_linear_cross_entropy"


def losses(callbacks: list[Any]) -> list[float]:
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        save_strategy="no",
        optim="sgd",
        disable_tqdm=True,
    )
    trainer = Trainer(tiny_model("llama"), arguments, train_dataset=Rows(), callbacks=callbacks)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    hf_kernel_patch.count_calls()
    found: dict[str, Any] = {}
    rows = hf_kernel_patch.status().rows
    found["outside"] = losses([])
    found["served"] = [row.served for row in rows if row.op == "linear_cross_entropy" and row.calls]
    hf_kernel_patch.unpatch()
    found["eager"] = losses([])
    found["callback"] = losses([hf_kernel_patch.KernelPatchCallback(KERNELS)])
    found["world"] = torch.distributed.get_world_size()
    if torch.distributed.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
