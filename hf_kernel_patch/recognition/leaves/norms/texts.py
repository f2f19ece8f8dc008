"""RMSNorm as the model families write it."""

from __future__ import annotations

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
HELIUM = _BODY.format(scaled="(self.weight.to(torch.float32) * hidden_states).to(input_dtype)")
T5 = """
def forward(self, hidden_states):
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)
    return self.weight * hidden_states
"""
CPMANT = """
def forward(self, hidden_states):
    if hidden_states.size(-1) != self.dim_norm:
        raise AssertionError("hidden_states.size(-1) != self.dim_norm")
    old_dtype = hidden_states.dtype
    variance = hidden_states.to(torch.float32).pow(2).mean(dim=-1, keepdim=True)
    hidden_states = (hidden_states * torch.rsqrt(variance + self.eps)).to(old_dtype) * self.weight
    return hidden_states
"""

# What calls a method of its own to normalise, and those methods.
NORM = """
def _norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
"""
NORM_BY_POW = """
def _norm(self, hidden_states):
    mean_squared = hidden_states.pow(2).mean(-1, keepdim=True) + self.eps
    return hidden_states * torch.pow(mean_squared, -0.5)
"""
NORM_IN_GROUPS = """
def _norm(self, x):
    if self.group_size is not None:
        x = x.reshape(*x.shape[:-1], -1, self.group_size)
    out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
    return out.flatten(-2) if self.group_size is not None else out
"""
_SCALED = """
def forward(self, x):
    output = self._norm(x.float())
    output = output * {weight}
    return output.type_as(x)
"""
GEMMA = _SCALED.format(weight="(1.0 + self.weight.float())")
MOSHI = _SCALED.format(weight="self.weight.float()")
LLAMA4 = """
def forward(self, x):
    output = self._norm(x.float()).type_as(x)
    return output * self.weight
"""
GEMMA4 = """
def forward(self, hidden_states):
    normed_output = self._norm(hidden_states.float())
    if self.with_scale:
        normed_output = normed_output * self.weight.float()
    return normed_output.type_as(hidden_states)
"""

# Without a weight.
NANOCHAT = """
def forward(self, x):
    return self._norm(x.float()).type_as(x)
"""
INKLING2 = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.float()
    hidden_states = hidden_states * torch.rsqrt(
        hidden_states.square().mean(-1, keepdim=True) + self.eps
    )
    return hidden_states.to(input_dtype)
"""
DEEPSEEK_V4 = """
def forward(self, x):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)
"""

# With a gate after the norm.
_GATED = """
def forward(self, hidden_states, {gate}):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    hidden_states = {scaled}
    hidden_states = hidden_states * {activation}(gate.to(torch.float32))
    return hidden_states.to(input_dtype)
"""
_ROUNDED = "self.weight * hidden_states.to(input_dtype)"
GATED = _GATED.format(gate="gate=None", scaled=_ROUNDED, activation="F.silu")
GATED_BY_NAME = _GATED.format(gate="gate", scaled=_ROUNDED, activation="ACT2FN[self.activation]")
GATED_IN_FLOAT32 = _GATED.format(
    gate="gate=None",
    scaled="self.weight.to(torch.float32) * hidden_states",
    activation="ACT2FN[self.activation]",
)

# With a gate before it.
_GATE_FIRST = """
def forward(self, hidden_states, gate=None):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    if gate is not None:
        hidden_states = hidden_states * nn.functional.silu(gate.to(torch.float32))
{normalised}
    return self.weight * hidden_states.to(input_dtype)
"""
GATE_FIRST = _GATE_FIRST.format(
    normalised="""\
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)"""
)
GATE_FIRST_IN_GROUPS = _GATE_FIRST.format(
    normalised="""\
    *prefix_dims, last_dim = hidden_states.shape
    group_count = last_dim // self.group_size
    groups = hidden_states.view(*prefix_dims, group_count, self.group_size)
    variance = groups.pow(2).mean(-1, keepdim=True)
    groups = groups * torch.rsqrt(variance + self.variance_epsilon)
    hidden_states = groups.view(*prefix_dims, group_count * self.group_size)"""
)
