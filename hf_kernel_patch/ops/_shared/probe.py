"""Whether Triton can run a kernel on this machine."""

from __future__ import annotations

from functools import cache

import torch


@cache
def probe(device: str = "cuda") -> str | None:
    """Compiles and launches small kernels once; why that does not work, or None."""
    try:
        from hf_kernel_patch.ops._shared.rows.norm import backward, forward

        x, weight = (torch.full((3, 16)[i:], i + 2.0, device=device) for i in (0, 1))
        out, _ = forward(x, weight, None, False, 0.0, 0.0, True)
        grads = backward(out, x, weight, None, False, True, 0.0, 0.0, True)
        for found, expected in zip((out, *grads[:2]), (3.0, 0.0, 9.0)):
            if found is None or not (found - expected).abs().max() < 1e-4:
                return "a Triton kernel gives wrong results"
    except Exception as error:  # no compiler, no driver, too old a device: the reason is reported
        return f"Triton cannot run a kernel: {type(error).__name__}: {error}"
    return None
