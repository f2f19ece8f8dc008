"""Norms without a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_kernel_patch.recognition.known import Adapter, Leaf, register
from hf_kernel_patch.recognition.leaves.norms import texts
from hf_kernel_patch.recognition.leaves.norms.kernel_arguments import missing
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch
    from torch import nn


def _weightless(text: str) -> Adapter:
    def adapter(site: Site) -> Callable[..., torch.Tensor]:
        original, rms_norm, lacks = site.original, site.op, missing(site, "group_size")

        def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
            eps = self.eps
            if site.falls_back(hidden_states, None, eps, unless=lacks, module=self):
                return original(self, hidden_states)
            return rms_norm(hidden_states, None, eps)

        def forward_x(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return forward(self, x)

        return forward_x if "forward(self, x)" in text else forward

    return adapter


def _scale_rounded(site: Site) -> Callable[..., torch.Tensor]:
    original, rms_norm, lacks = site.original, site.op, missing(site, "cast_scale")
    # offset, cast_first, gate, group_size, ..., cast_scale
    options = 0.0, True, None, None, True, "silu", False, True

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        arguments = x, None, self.eps, *options
        if site.falls_back(*arguments, unless=lacks, module=self):
            return original(self, x)
        return rms_norm(*arguments)

    return forward


LEAVES = {
    name: register(Leaf(name, "rms_norm", variants, helpers))
    for name, variants, helpers in (
        (
            "rms_norm.nanochat",
            {texts.NANOCHAT: _weightless(texts.NANOCHAT)},
            {"self._norm": texts.NORM},
        ),
        ("rms_norm.inkling2", {texts.INKLING2: _weightless(texts.INKLING2)}, {}),
        ("rms_norm.deepseek_v4", {texts.DEEPSEEK_V4: _scale_rounded}, {}),
    )
}
