"""RMSNorm as the model families write it: three orders of casting and multiplying, and gated."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from hf_kernel_patch.recognition.known import Adapter, Leaf, register
from hf_kernel_patch.recognition.modules import compiling, touched
from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import ROOT, innermost

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
_GATED = """
def forward(self, hidden_states, {gate}):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    hidden_states = self.weight * hidden_states.to(input_dtype)
    hidden_states = hidden_states * {silu}(gate.to(torch.float32))
    return hidden_states.to(input_dtype)
"""
GATED = _GATED.format(gate="gate=None", silu="F.silu")
GATED_BY_NAME = _GATED.format(gate="gate", silu="ACT2FN[self.activation]")
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
            if site.declines(hidden_states, weight, eps, offset, cast_first, module=self):
                return original(self, hidden_states)
            return rms_norm(hidden_states, weight, eps, offset, cast_first)

        def forward_x(self: Any, x: Any) -> Any:
            return forward(self, x)

        return forward_x if text is GEMMA else forward

    return adapter


LEAVES = {
    name: Leaf(name, "rms_norm", {text: _adapter(text)}, helpers)
    for name, text, helpers in (
        ("rms_norm.llama", LLAMA, {}),
        ("rms_norm.olmo2", OLMO2, {}),
        ("rms_norm.gemma", GEMMA, {"self._norm": GEMMA_NORM}),
    )
}
for _one in LEAVES.values():
    register(_one)
_seen: dict[type, tuple[Any, Any, Norm | None]] = {}


def _gated(site: Site) -> Callable[..., Any]:
    serve = _gate(site)

    def forward(self: Any, hidden_states: Any, gate: Any = None) -> Any:
        return serve(self, hidden_states, gate, None if gate is not None else "there is no gate")

    return forward


def _gated_by_name(site: Site) -> Callable[..., Any]:
    serve = _gate(site)

    def forward(self: Any, hidden_states: Any, gate: Any) -> Any:
        name = self.activation
        why_not = None if name == "silu" else f"the gate's activation is {name}, not silu"
        return serve(self, hidden_states, gate, why_not)

    return forward


def _gate(site: Site) -> Callable[..., Any]:
    """(norm, hidden states, gate, why the op may not serve them) -> the gated norm."""
    original, rms_norm = site.original, site.op
    missing = None
    if not all(_takes_six(function) for function in (rms_norm, site.kernel.refuse)):
        missing = f"{site.kernel.kernel_id} takes no gate"

    def serve(self: Any, hidden_states: Any, gate: Any, why_not: str | None) -> Any:
        arguments = hidden_states, self.weight, self.variance_epsilon, 0.0, True, gate
        if site.declines(*arguments, unless=missing or why_not, module=self):
            return original(self, hidden_states, gate)
        return rms_norm(*arguments)

    return serve


def _takes_six(function: Callable[..., Any]) -> bool:
    """Whether a kernel written by somebody else knows the last of the op's arguments, the gate."""
    try:
        inspect.signature(function).bind(*range(6))
    except TypeError:
        return False
    except ValueError:  # it does not say what it takes
        return True
    return True


register(Leaf("rms_norm.gated", "rms_norm", {GATED: _gated, GATED_BY_NAME: _gated_by_name}))


_CLASSES = 4096


def norm_of(kind: type) -> Norm | None:
    """What a class of norms computes, patched by us or not; None where its code is no known one."""
    forward, helper = getattr(kind, "forward", None), getattr(kind, "_norm", None)
    seen = _seen.get(kind)
    if seen is None or seen[0] is not forward or seen[1] is not helper:
        matching = (leaf for leaf in LEAVES.values() if leaf.why_not(forward, kind) is None)
        leaf = next(matching, None)
        norm = _NORMS[next(iter(leaf.variants))] if leaf else None
        if len(_seen) > _CLASSES:  # somebody makes classes without end
            _seen.clear()
        seen = _seen[kind] = forward, helper, norm
    return seen[2]


def modeling_of(forward: Any) -> Any:
    """The module of transformers that a forward is written in."""
    return sys.modules[innermost(forward).__module__]


def own_class(kind: type) -> type:
    """The class that a module had before one model's patch, where it has a class of ours."""
    root: type = getattr(kind, ROOT, kind)
    return root if kind.__mro__[1] is root else kind


def norms_in(modeling: Any) -> dict[type, Norm]:
    """The classes of a modelling module whose code is a norm of a known leaf."""
    kinds = [kind for kind in vars(modeling).values() if isinstance(kind, type)]
    return {kind: norm for kind in kinds if (norm := norm_of(kind)) is not None}


def norm_arguments(
    module: Any, known: dict[type, Norm]
) -> tuple[tuple[Any, float, float, bool], str | None]:
    """(weight, eps, offset, cast_first) of a norm that a rule spans, or why it cannot be.

    torch.compile, which cannot read sources, looks the class up among the ``known``.
    """
    kind = type(module)
    norm = known.get(own_class(kind)) if compiling() else norm_of(kind)
    if norm is None:
        return (None, 0.0, 0.0, True), f"{kind.__name__} is not a norm of a known leaf"
    why_not = "a hook on the norm needs the original" if touched(module) else None
    weight = module._parameters.get("weight")  # which costs less than the attribute
    if weight is None:
        weight = module.weight
    return (weight, getattr(module, norm.eps), norm.offset, norm.cast_first), why_not
