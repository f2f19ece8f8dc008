"""What a Triton kernel does that may be launched before the one in front of it has ended.

Where many small kernels follow each other, as in the graph of a decoded token, each of them waits
for the end of the one before, and then for its own launch. With programmatic dependent launch, of
NVIDIA's GPUs since Hopper, it is launched meanwhile.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton that cannot launch early
    gdc_launch_dependents = gdc_wait = None

__all__ = ["LAUNCHES_EARLY", "begin", "gdc_launch_dependents", "gdc_wait", "has_early_launch"]

#: Whether this Triton can launch a kernel while the one before is still running.
LAUNCHES_EARLY = gdc_wait is not None


@triton.jit
def begin(EARLY: tl.constexpr):
    """Wait for the kernel before, whose results are there then; let the next one be launched.

    Before anything else that a kernel does: where a program ends without it, the next kernel does
    not wait for the kernel before.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@cache
def has_early_launch(device: torch.device) -> bool:
    """Whether launches can start early on a device: from Hopper on."""
    if not LAUNCHES_EARLY or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
