"""What each op fuses and what that gives, in plain words."""

from __future__ import annotations

#: Op -> (what it is in a model, what becomes of it and what that saves).
FUSED: dict[str, tuple[str, str]] = {
    "rms_norm": (
        "RMSNorm",
        "square, mean, scale and weight are one operation with a backward of its own: fewer passes "
        "over memory, fewer tensors kept for the backward",
    ),
    "add_rms_norm": (
        "the residual sum and the norm after it",
        "one operation: the sum is not read again to be normalised",
    ),
    "rope": (
        "the rotary embedding of q and k",
        "one operation: no rotated copy of q and k is put together first",
    ),
    "qk_norm_rope": (
        "the norm and the rotary embedding of q and k",
        "one operation: the normalised q and k are not written in between",
    ),
    "swiglu": (
        "the activation times the gate of an MLP",
        "one operation: the activation is computed again in the backward, not kept for it",
    ),
    "moe": (
        "the experts",
        "tokens are sorted by expert once, then all experts are multiplied together: no loop over "
        "the experts",
    ),
    "linear_cross_entropy": (
        "the head and its loss",
        "computed chunk by chunk: the logits never exist as a whole",
    ),
    "lora": (
        "a linear layer and its adapter",
        "the adapter is added within its own product",
    ),
    "decode_attention": (
        "a decoded token",
        "one CUDA graph from embedding to logits: hundreds of launches become one",
    ),
}
