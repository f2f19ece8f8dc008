"""A training loop of your own. Runs on a CPU or a GPU; nothing is downloaded.

python examples/plain_loop.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_kernel_patch

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# Small, so that it trains in seconds. In your program: LlamaForCausalLM.from_pretrained(...).
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=256,
)
model = LlamaForCausalLM(config).to(device).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
ids = torch.randint(0, 256, (4, 64), device=device)

hf_kernel_patch.count_calls()  # so that the report says what the kernels did
report = hf_kernel_patch.patch_transformers()  # before or after the model is built

losses = []
for _ in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
print("\n".join(f"{row.op}: {row.served} calls by {row.kernel}" for row in report if row.served))

hf_kernel_patch.unpatch()  # every original is back
print(hf_kernel_patch.status())
