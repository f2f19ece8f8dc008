"""Text generation, as it is and patched: the same tokens.

python examples/generate.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_kernel_patch

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
# Small, and random. In your program: LlamaForCausalLM.from_pretrained(...).
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=256,
    eos_token_id=None,
)
model = LlamaForCausalLM(config).to(device).eval()
prompt = torch.randint(0, 256, (1, 16), device=device)
wanted = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}

plain = model.generate(prompt, **wanted)
hf_kernel_patch.count_calls()
# "auto" on a CUDA device; on a CPU these are named, for "auto" takes those alone that pay there.
kernels = "auto" if device == "cuda" else "rms_norm,rope,swiglu"
with hf_kernel_patch.patched(kernels, models="llama") as report:
    fused = model.generate(prompt, **wanted)
    print(report)

print("the same tokens" if torch.equal(plain, fused) else "other tokens")
