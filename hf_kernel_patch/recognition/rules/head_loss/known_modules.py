"""Modules around a head that are known by the code of their classes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from hf_kernel_patch.recognition.modules import compiling, touched
from hf_kernel_patch.recognition.source import canonical, fingerprint, innermost

if TYPE_CHECKING:
    from torch import nn

    from hf_kernel_patch.recognition.rules.head_loss.steps import Step

CAP = """
def forward(self, hidden_states):
    return torch.tanh(hidden_states / self.softcap) * self.softcap
"""
PROJECTION = """
def forward(self, hidden_states):
    logits = self.out_proj(hidden_states)
    return logits
"""


def plain_steps(step: Step) -> tuple[Step, ...]:
    """A step as steps that the op may know: a module that caps the logits does three of them."""
    if step[0] != "module" or not _runs(step[1], CAP):
        return (step,)
    cap = step[1].softcap
    return ("/", cap), ("tanh",), ("*", cap)


def plain_head(head: nn.Module) -> nn.Module:
    """The linear layer of a head that only calls it, or the head itself."""
    return head.out_proj if _runs(head, PROJECTION) else head


#: (a class's forward, source) -> whether it is that code; filled as it is asked.
_known: dict[tuple[object, str], bool] = {}


def _runs(module: nn.Module, source: str) -> bool:
    """Whether calling a module runs this code, and no more."""
    key = getattr(type(module), "forward", None), source
    if key not in _known:
        if compiling():  # a dictionary that grows would be a guard of the compiled graph
            return False
        function = innermost(key[0])
        plain = inspect.isfunction(function)
        _known[key] = plain and fingerprint(function) == canonical(source)
    return _known[key] and not touched(module)
