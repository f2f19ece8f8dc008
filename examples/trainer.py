"""The Trainer of transformers: one callback patches its model while it trains.

python examples/trainer.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import hf_kernel_patch

set_seed(0)
# Small, so that it trains in seconds. In your program: LlamaForCausalLM.from_pretrained(...).
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=256,
)
ids = torch.randint(0, 256, (4, 64)).repeat(8, 1).tolist()
rows = [{"input_ids": row, "labels": row} for row in ids]

hf_kernel_patch.count_calls()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=4,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=rows,
        callbacks=[hf_kernel_patch.KernelPatchCallback()],
    )
    print(hf_kernel_patch.status())  # the callback has patched this model, and no other
    trainer.train()
print(hf_kernel_patch.status())  # and has put the originals back at the end
