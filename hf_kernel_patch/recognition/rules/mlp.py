"""The gated MLP: act(gate) * up between two projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_kernel_patch.recognition.form import Form, register_form
from hf_kernel_patch.recognition.modules import activation_of
from hf_kernel_patch.recognition.site import Site

GATE_UP_DOWN = """
def forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
"""
GATE_UP_DOWN_INLINE = """
def forward(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
"""
W1_W3_W2 = """
def forward(self, hidden_states):
    current_hidden_states = self.act_fn(self.w1(hidden_states)) * self.w3(hidden_states)
    current_hidden_states = self.w2(current_hidden_states)
    return current_hidden_states
"""
HALVES = """
def forward(self, hidden_states):
    up_states = self.gate_up_proj(hidden_states)
    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)
    return self.down_proj(up_states)
"""


def _gated(site: Site, act_fn: Any, gate: Any, up: Any) -> Any:
    """act_fn(gate) * up, by the op or as the original computes it."""
    activation, why_not = activation_of(act_fn)
    if site.declines(gate, up, activation, unless=why_not):
        return act_fn(gate) * up
    return site.op(gate, up, activation)


def _gate_up_down(site: Site) -> Callable[..., Any]:
    def forward(self: Any, x: Any) -> Any:
        return self.down_proj(_gated(site, self.act_fn, self.gate_proj(x), self.up_proj(x)))

    return forward


def _w1_w3_w2(site: Site) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Any) -> Any:
        gate, up = self.w1(hidden_states), self.w3(hidden_states)
        return self.w2(_gated(site, self.act_fn, gate, up))

    return forward


def _halves(site: Site) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Any) -> Any:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(_gated(site, self.activation_fn, gate, up))

    return forward


register_form(
    Form(
        "swiglu.gate_up_down",
        "swiglu",
        {GATE_UP_DOWN: _gate_up_down, GATE_UP_DOWN_INLINE: _gate_up_down},
    )
)
register_form(Form("swiglu.w1_w3_w2", "swiglu", {W1_W3_W2: _w1_w3_w2}))
register_form(Form("swiglu.halves", "swiglu", {HALVES: _halves}))
