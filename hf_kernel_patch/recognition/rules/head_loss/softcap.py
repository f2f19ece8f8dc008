"""Modules that cap the logits."""

from __future__ import annotations

import inspect
from typing import Any

from hf_kernel_patch.recognition.modules import compiling, touched
from hf_kernel_patch.recognition.source import canonical, fingerprint, innermost

CAP = """
def forward(self, hidden_states):
    return torch.tanh(hidden_states / self.softcap) * self.softcap
"""


def plain_steps(step: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """A step as the op may know it: that of a known module in its three parts."""
    if step[0] != "module" or not _caps(step[1]):
        return (step,)
    cap = step[1].softcap
    return ("/", cap), ("tanh",), ("*", cap)


#: Whether a class's forward is the one above, as far as it was asked for.
_known: dict[Any, bool] = {}


def _caps(module: Any) -> bool:
    forward = getattr(type(module), "forward", None)
    if compiling():  # when a dictionary that grows would be one of its guards
        return _known.get(forward, False) and not touched(module)
    if forward not in _known:
        function = innermost(forward)
        plain = inspect.isfunction(function)
        _known[forward] = plain and fingerprint(function) == canonical(CAP)
    return _known[forward] and not touched(module)
