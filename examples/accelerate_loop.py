"""A loop with accelerate, on one device or, by `accelerate launch`, on several.

python examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import hf_kernel_patch

torch.manual_seed(0)
# Small, so that it trains in seconds. In your program: LlamaForCausalLM.from_pretrained(...).
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=256,
)
model = LlamaForCausalLM(config).train()
# Before `prepare`, which may put a forward of its own on the model.
hf_kernel_patch.apply_default_kernels(model)

accelerator = Accelerator()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(torch.randint(0, 256, (4, 64)).repeat(8, 1), batch_size=4)
prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)

losses = []
for ids in loader:
    loss = prepared(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
accelerator.print(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
accelerator.print(hf_kernel_patch.status())

hf_kernel_patch.unpatch(model)
accelerator.end_training()
