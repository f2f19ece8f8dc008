"""Norms that take x alone and scale it: the orders of casting and multiplying."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from hf_kernel_patch.recognition.known import Adapter, Leaf, register
from hf_kernel_patch.recognition.leaves.norms import texts
from hf_kernel_patch.recognition.leaves.norms.kernel_arguments import missing
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch
    from torch import nn


class Norm(NamedTuple):
    """What a source text computes.

    Attributes:
        eps: the name of the module's attribute that holds eps.
        offset, cast_first: as the op takes them.
        asks: attributes of the module, on whose values it depends whether this is what it computes;
            see ``spanned``.
    """

    eps: str
    offset: float
    cast_first: bool
    asks: tuple[str, ...] = ()


#: The originals that take a weight raise an error without one; the op would not.
NO_WEIGHT = "there is no weight"
#: Every text that the ops of a norm and its neighbours can express too, for some modules at least.
NORMS = {
    texts.LLAMA: Norm("variance_epsilon", 0.0, True),
    texts.OLMO2: Norm("variance_epsilon", 0.0, False),
    texts.HELIUM: Norm("variance_epsilon", 0.0, False),
    texts.GEMMA: Norm("eps", 1.0, False, ("_norm",)),
    texts.MOSHI: Norm("eps", 0.0, False, ("_norm",)),
    texts.LLAMA4: Norm("eps", 0.0, True, ("_norm",)),
    texts.GEMMA4: Norm("eps", 0.0, False, ("_norm", "with_scale")),
}
#: Qwen4's forward is Gemma's, with another ``_norm`` method.
GROUPED = Norm("eps", 1.0, False, ("_norm", "group_size"))


def _adapter(text: str) -> Adapter:
    eps_name, offset, cast_first, _ = NORMS[text]

    def adapter(site: Site) -> Callable[..., torch.Tensor]:
        original, rms_norm = site.original, site.op

        def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
            weight, eps = self.weight, getattr(self, eps_name)
            if weight is None or site.falls_back(
                hidden_states, weight, eps, offset, cast_first, module=self
            ):
                return original(self, hidden_states)
            return rms_norm(hidden_states, weight, eps, offset, cast_first)

        def forward_x(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return forward(self, x)

        return forward_x if "forward(self, x)" in text else forward

    return adapter


def _with_scale(site: Site) -> Callable[..., torch.Tensor]:
    original, rms_norm, lacks = site.original, site.op, missing(site, "group_size")

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        scale = self.with_scale
        weight, fallback = (self.weight, None) if scale else (None, lacks)
        if scale and weight is None:
            fallback = NO_WEIGHT
        arguments = hidden_states, weight, self.eps, 0.0, False
        if site.falls_back(*arguments, unless=fallback, module=self):
            return original(self, hidden_states)
        return rms_norm(*arguments)

    return forward


def _in_groups(site: Site) -> Callable[..., torch.Tensor]:
    original, rms_norm, lacks = site.original, site.op, missing(site, "group_size")

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        arguments: tuple[object, ...] = x, weight, self.eps, 1.0, False
        fallback = NO_WEIGHT if weight is None else None
        if (group_size := self.group_size) is not None:
            arguments, fallback = (*arguments, None, group_size), lacks or fallback
        if site.falls_back(*arguments, unless=fallback, module=self):
            return original(self, x)
        return rms_norm(*arguments)

    return forward


def _t5(site: Site) -> Callable[..., torch.Tensor]:
    """Llama's norm, except that an input of another dtype is cast to the weight's.

    A model in half precision whose ``wo`` is kept in float32 has such inputs.
    """
    original, rms_norm, lacks = site.original, site.op, missing(site, "cast_to_weight")
    extras = None, None, True, "silu", True  # gate, group_size, ..., cast_to_weight

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        arguments: tuple[object, ...] = hidden_states, weight, self.variance_epsilon, 0.0, True
        fallback = None
        if weight.dtype != hidden_states.dtype:
            arguments, fallback = (*arguments, *extras), lacks
        if site.falls_back(*arguments, unless=fallback, module=self):
            return original(self, hidden_states)
        return rms_norm(*arguments)

    return forward


def _cpmant(site: Site) -> Callable[..., torch.Tensor]:
    original, rms_norm = site.original, site.op

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        arguments = hidden_states, weight, self.eps, 0.0, True
        fallback = NO_WEIGHT if weight is None else None
        if hidden_states.size(-1) != self.dim_norm:
            fallback = "the original checks dim_norm"
        if site.falls_back(*arguments, unless=fallback, module=self):
            return original(self, hidden_states)
        return rms_norm(*arguments)

    return forward


_METHOD = {"self._norm": texts.NORM}
LEAVES = {
    name: register(Leaf(name, "rms_norm", variants, helpers))
    for name, variants, helpers in (
        ("rms_norm.llama", {texts.LLAMA: _adapter(texts.LLAMA)}, {}),
        (
            "rms_norm.olmo2",
            {text: _adapter(text) for text in (texts.OLMO2, texts.HELIUM)},
            {},
        ),
        ("rms_norm.gemma", {texts.GEMMA: _adapter(texts.GEMMA)}, _METHOD),
        ("rms_norm.moshi", {texts.MOSHI: _adapter(texts.MOSHI)}, _METHOD),
        ("rms_norm.llama4", {texts.LLAMA4: _adapter(texts.LLAMA4)}, _METHOD),
        ("rms_norm.gemma4", {texts.GEMMA4: _with_scale}, {"self._norm": texts.NORM_BY_POW}),
        ("rms_norm.qwen4", {texts.GEMMA: _in_groups}, {"self._norm": texts.NORM_IN_GROUPS}),
        ("rms_norm.t5", {texts.T5: _t5}, {}),
        ("rms_norm.cpmant", {texts.CPMANT: _cpmant}, {}),
    )
}
