"""LoRA by PEFT on a patched model, from training to the merged weights.

python examples/lora.py
"""

import torch
from peft import LoraConfig, get_peft_model
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
base = LlamaForCausalLM(config)
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).to(device)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
ids = torch.randint(0, 256, (4, 64), device=device)

hf_kernel_patch.count_calls()
hf_kernel_patch.apply_default_kernels(model)  # it finds the model inside of PEFT's
losses = []
for _ in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
for row in hf_kernel_patch.status():
    print(f"{row.op}: {row.served} calls by {row.kernel}, fallbacks: {row.fallbacks or 'none'}")

hf_kernel_patch.unpatch(model)
merged = model.merge_and_unload()  # a plain LlamaForCausalLM
print(type(merged).__name__, merged.model.layers[0].self_attn.q_proj)
