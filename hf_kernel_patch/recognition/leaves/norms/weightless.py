"""Norms without a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_kernel_patch.recognition.known import Adapter, Leaf, register
from hf_kernel_patch.recognition.leaves.norms import texts
from hf_kernel_patch.recognition.leaves.norms.taken import missing
from hf_kernel_patch.recognition.site import Site


def _weightless(text: str) -> Adapter:
    def adapter(site: Site) -> Callable[..., Any]:
        original, rms_norm, without = site.original, site.op, missing(site, "group_size")

        def forward(self: Any, hidden_states: Any) -> Any:
            eps = self.eps
            if site.declines(hidden_states, None, eps, unless=without, module=self):
                return original(self, hidden_states)
            return rms_norm(hidden_states, None, eps)

        def forward_x(self: Any, x: Any) -> Any:
            return forward(self, x)

        return forward_x if "forward(self, x)" in text else forward

    return adapter


def _scale_rounded(site: Site) -> Callable[..., Any]:
    original, rms_norm, without = site.original, site.op, missing(site, "cast_scale")
    # offset, cast_first, gate, group_size, ..., cast_scale
    options = 0.0, True, None, None, True, "silu", False, True

    def forward(self: Any, x: Any) -> Any:
        arguments = x, None, self.eps, *options
        if site.declines(*arguments, unless=without, module=self):
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
