"""RMSNorm as the model families write it: three orders of casting and multiplying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from hf_kernel_patch.forms.activation import touched
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


class Norm(NamedTuple):
    """What a text computes: the attribute that holds eps, and the op's options."""

    eps: str
    offset: float
    cast_first: bool


_NORMS = {
    LLAMA: Norm("variance_epsilon", 0.0, True),
    OLMO2: Norm("variance_epsilon", 0.0, False),
    GEMMA: Norm("eps", 1.0, False),
}


def _adapter(text: str) -> Adapter:
    eps_name, offset, cast_first = _NORMS[text]

    def adapter(site: Site) -> Callable[..., Any]:
        original, rms_norm = site.original, site.op

        def forward(self: Any, hidden_states: Any) -> Any:
            weight, eps = self.weight, getattr(self, eps_name)
            if site.declines(hidden_states, weight, eps, offset, cast_first):
                return original(self, hidden_states)
            return rms_norm(hidden_states, weight, eps, offset, cast_first)

        def forward_x(self: Any, x: Any) -> Any:
            return forward(self, x)

        return forward_x if text is GEMMA else forward

    return adapter


FORMS = {
    name: register_form(Form(name, "rms_norm", {text: _adapter(text)}, helpers))
    for name, text, helpers in (
        ("rms_norm.llama", LLAMA, {}),
        ("rms_norm.olmo2", OLMO2, {}),
        ("rms_norm.gemma", GEMMA, {"self._norm": GEMMA_NORM}),
    )
}
_seen: WeakKeyDictionary[type, tuple[Any, Norm | None]] = WeakKeyDictionary()


def norm_of(kind: type) -> Norm | None:
    """What a class of norms computes, patched by us or not; None where its code is no known one."""
    forward = getattr(kind, "forward", None)
    seen = _seen.get(kind)
    if seen is None or seen[0] is not forward:
        matching = (form for form in FORMS.values() if callable(form.adapter_for(forward, kind)))
        form = next(matching, None)
        seen = _seen[kind] = forward, _NORMS[next(iter(form.variants))] if form else None
    return seen[1]


def norm_arguments(module: Any) -> tuple[tuple[Any, ...], str | None]:
    """(weight, eps, offset, cast_first) of a norm that another form spans, or why it cannot be.

    torch.compile has to know ``norm_of`` as constant (``torch.compiler.assume_constant_result``).
    """
    norm = norm_of(type(module))
    if norm is None:
        return (None, 0.0, 0.0, True), f"{type(module).__name__} is not a norm of a known form"
    why_not = "a hook on the norm needs the original" if touched(module) else None
    return (module.weight, getattr(module, norm.eps), norm.offset, norm.cast_first), why_not
