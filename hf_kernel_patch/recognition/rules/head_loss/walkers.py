"""Is a model's output read by its user, or by a framework that walks over all that it holds?"""

from __future__ import annotations

import sys

#: Packages and modules that walk over every output, to cast its tensors, to hook their gradients or
#: to find out which need one; what they find goes back into an output.
WALKERS = (
    "accelerate",
    "deepspeed",
    "hf_kernel_patch.recognition.rules.head_loss",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "pytorch_lightning",
    "torch.distributed",
    "torch.nn.modules.module",
    "torch.nn.parallel",
)
#: Modules through which they walk, and which other code uses, too: who called those counts.
BETWEEN = (
    "dataclasses",
    "torch._tensor",
    "torch.utils._cxx_pytree",
    "torch.utils._pytree",
    "transformers.utils.generic",
)


def walked_over(depth: int = 2) -> bool:
    """Whether a framework called the function so many calls up, or we ourselves did."""
    frame = sys._getframe(depth)
    while frame.f_globals.get("__name__") in BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    name = str(frame.f_globals.get("__name__"))
    return name in WALKERS or name.startswith(_PREFIXES)


_PREFIXES = tuple(f"{name}." for name in WALKERS)
