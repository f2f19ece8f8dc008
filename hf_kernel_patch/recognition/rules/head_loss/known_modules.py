"""Modules around a head that are known by the code of their classes."""

from __future__ import annotations

import inspect
from typing import Any

from hf_kernel_patch.recognition.modules import compiling, touched
from hf_kernel_patch.recognition.source import canonical, fingerprint, innermost

CAP = """
def forward(self, hidden_states):
    return torch.tanh(hidden_states / self.softcap) * self.softcap
"""
PROJECTION = """
def forward(self, hidden_states):
    logits = self.out_proj(hidden_states)
    return logits
"""


def plain_steps(step: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """A step as the op may know it: that of a module which caps the logits in its three parts."""
    if step[0] != "module" or not _runs(step[1], CAP):
        return (step,)
    cap = step[1].softcap
    return ("/", cap), ("tanh",), ("*", cap)


def plain_head(head: Any) -> Any:
    """The linear layer that a head does no more than call, or the head."""
    return head.out_proj if _runs(head, PROJECTION) else head


#: (a class's forward, source) -> whether it is that code, as far as it was asked for.
_known: dict[tuple[Any, str], bool] = {}


def _runs(module: Any, source: str) -> bool:
    """Whether calling a module runs this code, and no more."""
    key = getattr(type(module), "forward", None), source
    if key not in _known:
        if compiling():  # when a dictionary that grows would be one of its guards
            return False
        function = innermost(key[0])
        plain = inspect.isfunction(function)
        _known[key] = plain and fingerprint(function) == canonical(source)
    return _known[key] and not touched(module)
