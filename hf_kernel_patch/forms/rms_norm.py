"""RMSNorm as the model families write it: three orders of casting and multiplying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_kernel_patch.forms.form import Adapter, Form, register_form
from hf_kernel_patch.forms.site import Site

_BODY = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return {scaled}
"""
LLAMA = _BODY.format(scaled="self.weight * hidden_states.to(input_dtype)")
OLMO2 = _BODY.format(scaled="(self.weight * hidden_states).to(input_dtype)")
GEMMA = """
def forward(self, x):
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)
"""
GEMMA_NORM = """
def _norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
"""


def _adapter(offset: float, cast_first: bool) -> Adapter:
    def adapter(site: Site) -> Callable[..., Any]:
        original, rms_norm = site.original, site.op

        def forward(self: Any, hidden_states: Any) -> Any:
            weight, eps = self.weight, self.variance_epsilon
            if site.declines(hidden_states, weight, eps, offset, cast_first):
                return original(self, hidden_states)
            return rms_norm(hidden_states, weight, eps, offset, cast_first)

        return forward

    return adapter


def _gemma(site: Site) -> Callable[..., Any]:
    original, rms_norm = site.original, site.op

    def forward(self: Any, x: Any) -> Any:
        weight, eps = self.weight, self.eps
        if site.declines(x, weight, eps, 1.0, False):
            return original(self, x)
        return rms_norm(x, weight, eps, 1.0, False)

    return forward


register_form(Form("rms_norm.llama", "rms_norm", {LLAMA: _adapter(0.0, True)}))
register_form(Form("rms_norm.olmo2", "rms_norm", {OLMO2: _adapter(0.0, False)}))
register_form(Form("rms_norm.gemma", "rms_norm", {GEMMA: _gemma}, {"self._norm": GEMMA_NORM}))
