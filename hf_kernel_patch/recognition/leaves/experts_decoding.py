"""Where ``generate`` changes the experts' implementation of transformers 5 while it decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hf_kernel_patch.recognition.known import Leaf, register
from hf_kernel_patch.recognition.leaves.experts import why_not_plain
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch
    from torch import nn

_TOLD = (
    "We will be switching to 'batched_mm' for the decoding stage as it is much more performant "
    "than 'grouped_mm' on smaller inputs. If you experience any issues with this, please open an "
    "issue on the Hugging Face Transformers GitHub repository."
)
# For decoding on an accelerator, generate takes batched_mm instead of the default.
_TO_BATCHED = f"""
def _optimize_model_for_decode(self):
    original_experts_implementation = self.config._experts_implementation
    if original_experts_implementation == "grouped_mm" and self.device.type != "cpu":
        logger.info_once({_TOLD!r})
        self.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        if original_experts_implementation == "grouped_mm" and self.device.type != "cpu":
            self.set_experts_implementation(original_experts_implementation)
"""
_TO_BATCHED_ALL = f"""
def _optimize_model_for_decode(self):
    original_experts_implementation = self.get_experts_implementation()
    switch = self.device.type != "cpu" and "grouped_mm" in original_experts_implementation.values()
    if switch:
        logger.info_once({_TOLD!r})
        self.set_experts_implementation(
            {{
                k: "batched_mm" if v == "grouped_mm" else v
                for k, v in original_experts_implementation.items()
            }}
        )
    try:
        yield
    finally:
        if switch:
            self.set_experts_implementation(original_experts_implementation)
"""


def _decoding(site: Site) -> Callable[..., torch.Tensor]:
    """No switch, which would pass for a choice of the user's: the default stays in force.

    Unless the model has experts that are left to the default, which is the better for a switch.
    """
    original = site.original

    @contextmanager
    def _optimize_model_for_decode(self: nn.Module) -> Iterator[None]:
        if site.in_force(self) and not any(_is_left(module) for module in self.modules()):
            yield
            return
        with original(self):
            yield

    return _optimize_model_for_decode


def _is_left(module: nn.Module) -> bool:
    """Whether a module is experts of another layout than the plain one, or with their own gate."""
    return hasattr(module, "_apply_gate") and why_not_plain(module) is not None


register(
    Leaf(
        "moe.decoding",
        "moe",
        {_TO_BATCHED: _decoding, _TO_BATCHED_ALL: _decoding},
        inherited=True,
    )
)
