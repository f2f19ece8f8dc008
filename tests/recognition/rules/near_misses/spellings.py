"""Code that the rules know, in all spellings: it is rewritten and runs as before. See the package.

Where a call falls back, ``# <= reason`` says why.
"""
# ruff: noqa
# fmt: off

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

None_ = None
add_rms_norm = swiglu = qk_norm_rope = fused_loss = 2  # names that the rules would take


class ResidualNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.pre_ffn_layernorm, self.__norm = (LlamaRMSNorm(8) for _ in range(3))
        self.mlp, self.act_fn, self.scale = nn.Linear(8, 8), nn.SiLU(), 0.5
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def plain(self, x, y):
        x = x + y
        x = self.norm(x)
        return x

    def renamed(self, x, y):
        x = y + x
        kept = x
        x = self.norm(x)
        x = self.mlp(x)
        return kept + x

    def renamed_twice(self, x, y):
        s = x + y
        a = s
        s = y
        b = a
        z = self.norm(b)
        return a, b, s, z

    def annotated(self, x, y):
        s: torch.Tensor = x + y
        z: torch.Tensor = self.norm(s)
        return s, z

    def annotated_at_length(self, x, y):
        s: tuple[
            torch.Tensor,
            torch.Tensor,
        ] = x + y
        z = self.norm(s)
        return s, z

    def annotated_names(self, x, y):
        s = x + y
        kept: torch.Tensor = s
        z = self.norm(kept)
        return s, z

    def commented(self, x, y):
        s = x + y  # the sum
        # and, after
        # all this,

        z = self.norm(s)  # its norm
        return s, z

    def many_lines(self, x, y):
        s = (
            x  # the left

            + y
        )  # done
        z = self.norm(
            # of
            s,
        )
        return s, z

    def continued(self, x, y):
        s = x \
            + y
        z = \
            self.norm(s)
        return s, z

    def parentheses(self, x, y):
        (s) = ((x) + (y))
        (z) = (self.norm((s)))
        return s, z

    def one_line(self, x, y):
        s = x + y; z = self.norm(s); return s, z

    def after_many_lines(self, x, y):
        s = x + y; z = self.norm(
            s
        ); z = z * 2
        return s, z

    def non_ascii(self, x, y):
        größe = "ä€𝄞"; sé = x + y; zé = self.norm(sé); größe += "é"
        return sé, zé, len(größe)

    def tabs(self, x, y):
    	if x is not None:
    		s = x + y
    		z = self.norm(s)
    	return s, z

    def expressions(self, x, y):
        s = self.mlp(x) * self.scale + F.dropout(y, 0.1, False)
        z = self.norm(s)
        return s, z

    def three_summands(self, x, y):
        s = x + y + 2 * x
        z = self.norm(s)
        return s, z

    def lambda_summands(self, x, y):
        s = (lambda: x)() + (y if self.training else x)
        z = self.norm(s)
        return s, z

    def used_later(self, x, y):
        s = x + y
        z = self.norm(s)
        s = s * z
        return s, z

    def two_of_them(self, x, y):
        s = x + y
        z = self.norm(s)
        s = z + y
        z = self.pre_ffn_layernorm(s)
        return s, z

    def in_a_loop(self, x, y):
        for _ in range(3):
            x = x + y
            y = self.norm(x)
        return x, y

    def on_each_path(self, x, y):
        if x.dim() == 2:
            s = x + y
            z = self.norm(s)
        else:
            s = y + x
            z = self.pre_ffn_layernorm(s)
        return s, z

    def under_try(self, x, y):
        try:
            with torch.enable_grad():
                s = x + y
                z = self.norm(s)
        finally:
            pass
        return s, z

    def under_match(self, x, y):
        match x.dim():
            case 3:
                s = x + y
                z = self.norm(s)
        return s, z

    def taken_names(self, x, y):
        normed, add_rms_norm_ = x, y
        s = x + y
        z = self.norm(s)
        return s, z, normed, add_rms_norm_, add_rms_norm

    def helper_name_imported(self, x, y):
        import math as add_rms_norm, operator as normed
        s = x + y
        z = self.norm(s)
        return s, z

    def helper_name_defined(self, x, y):
        def add_rms_norm(normed): return normed
        s = x + y
        z = self.norm(s)
        return s, z

    def private(self, x, y):
        s = x + y
        z = self.__norm(s)
        return s, z

    def broadcast(self, x, y):  # <= a summand is no tensor
        s = x + 1.5
        z = self.norm(s)
        return s, z

    def positional(self, x, y, /):
        s = x + y
        z = self.norm(s)
        return s, z

    def with_a_product(self, x, y):
        s = x + self.act_fn(x) * y
        z = self.norm(s)
        return s, z

    def norm_returned(self, x, y):
        s = x + y
        return self.norm(s)

    def norm_in_a_call(self, x, y):
        x = x + self.mlp(self.pre_ffn_layernorm(x))
        x = x + self.mlp(self.norm(x))
        return x

    def norm_in_a_call_by_name(self, x, y):
        s = y + x
        kept = s
        z = kept + self.mlp(input=self.norm(s))
        return z

    def norm_in_a_product(self, x, y):
        s = x + y
        z = self.scale * (
            # first
            self.norm(
                s
            ) * x
        )
        return s, z

    def norm_taken_apart(self, x, y):
        s = x + y
        z, w = self.norm(s)
        return s, z, w

    def norm_among_others(self, x, y):
        s = x + y
        return [s, -self.norm(s)[0], self.mlp(y)], self.mlp(s)

    def norm_to_an_attribute(self, x, y):
        s = x + y
        self.last = self.norm(s)
        return s, self.last

    def norm_added_in_place(self, x, y):
        z = self.mlp(x)
        s = x + y
        z += self.norm(s)
        return s, z

    def norm_added(self, x, y):
        s = x + y
        z = s + self.norm(s)
        z = z + self.norm(z)
        return s, z

    def sum_in_place_before(self, x, y):
        s = self.mlp(x)
        s += 1
        s = s + y
        z = self.norm(s)
        s = self.mlp(s)
        s += 1
        return s, z

    def sum_in_the_norm(self, x, y):
        return self.mlp(self.norm(
            x  # and
            + y
        ))

    def sums_in_norms(self, x, y):
        z = self.norm(self.pre_ffn_layernorm(x + y) + y)
        return z

    def sum_in_the_norm_of_a_lambda(self, x, y):
        both = lambda z: self.norm(x + z)
        return both(y)

    def sums_in_norms_of_many(self, x, y):
        return [self.norm(x + one) for one in (x, y)]

    def sum_in_the_norm_in_a_function(self, x, y):
        def both(z):
            return self.norm(x + z)

        return both(y)

    def on_some_paths(self, x, y):
        found = []
        for deep in (True, False):
            s = x + y
            kept = s
            if deep:
                # as most do
                z = s
                s = self.norm(z)
            found += [s, kept]
        return found

    def on_some_paths_by_attributes(self, x, y):
        found = []
        for self.deep in ("deep", None, "flat"):
            s = x + y
            if (
                self.deep is not None
                and not self.deep == "flat"
            ):
                z = self.mlp(self.norm(s))
            elif self.deep is None:
                z = s + 1
            else:
                s[0] = 0
                z = self.mlp(s)
            found += [s, z]
        return found

    def on_some_paths_annotated(self, x, y):
        for flat in (True, False):
            s: torch.Tensor = x + y  # the sum
            if not flat: s = self.norm(s)
        return s


class GatedProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.act_fn, self.act, self.__act = ACT2FN["silu"], nn.SiLU(), nn.SiLU()
        self.activation_fn, self.hidden_act = nn.SiLU(), ACT2FN["gelu_pytorch_tanh"]
        self.act_relu, self.act_in_place = nn.ReLU(), nn.SiLU(inplace=True)
        self.silu, self.erf_gelu, self.activation_func = F.silu, nn.GELU(), nn.GELU(approximate="tanh")
        self.act_new, self.act_erf, self.dropout = ACT2FN["gelu_new"], ACT2FN["gelu"], nn.Dropout(0.0)
        self.act_none = None
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))

    def plain(self, x, y):
        return self.act_fn(x) * y

    def other_way(self, x, y):
        return y * self.act_fn(x)

    def mlp(self, x, y):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def mlp_other_way(self, x, y):
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))

    def functional(self, x, y):
        return F.silu(x) * y

    def functional_by_path(self, x, y):
        return nn.functional.silu(x) * y

    def other_module(self, x, y):
        return self.act(x) * y

    def long_name(self, x, y):
        return self.activation_fn(x) * y

    def gelu(self, x, y):
        return self.hidden_act(x) * y

    def private(self, x, y):
        return self.__act(x) * y

    def halves(self, x, y):
        gate, up = torch.cat([x, y], -1).chunk(2, dim=-1)
        return up * self.act_fn(gate)

    def sliced(self, x, y):
        return self.act_fn(x[..., :4]) * y[..., 4:]

    def many_lines(self, x, y):
        return (
            self.act_fn(  # active
                x
            )
            # times
            * y
        )

    def many_lines_other_way(self, x, y):
        return (
            self.up_proj(
                y
            )

            * self.act_fn(
                x,
            )
        )

    def parentheses(self, x, y):
        return ((self.act_fn((x)))) * ((y))

    def continued(self, x, y):
        return self.act_fn(x) \
            * y

    def non_ascii(self, x, y):
        é = {"ä": "€𝄞", "z": self.act_fn(x) * y}; return é["z"]

    def tabs(self, x, y):
    	if x is not None:
    		z = self.act_fn(x)	*	y
    	return z

    def with_a_third(self, x, y):
        return self.act_fn(x) * y * x

    def third_before(self, x, y):
        return x * self.act_fn(x) * y

    def nested(self, x, y):
        return self.act_fn(self.act(x) * y) * (self.act_fn(y) * x)

    def nested_other_way(self, x, y):
        return (x * self.act_fn(y)) * self.act(y * self.act_fn(x))

    def in_a_lambda(self, x, y):
        return (lambda a: self.act_fn(a) * y)(x)

    def in_a_comprehension(self, x, y):
        return [self.act_fn(one) * other for one, other in zip(x, y)]

    def in_a_function_inside(self, x, y):
        def product(a):
            return self.act_fn(a) * y

        return product(x)

    def conditional_factor(self, x, y):
        return self.act_fn(x) * (y if x is not None else x)

    def lambda_factor(self, x, y):
        return self.act_fn((lambda: x)()) * (lambda: y)()

    def negative(self, x, y):
        return self.act_fn(-x) * -y

    def power(self, x, y):
        return 1 + self.act_fn(x) * y ** 2 - 3

    def annotated(self, x, y):
        z: torch.Tensor = self.act_fn(x) * y
        return z

    def taken_names(self, x, y):
        swiglu_ = x
        return self.act_fn(x) * y + swiglu_ * swiglu

    def other_names(self, x, y):
        return self.silu(x) * y + self.erf_gelu(x) * y + self.activation_func(x) * y

    def other_gelus(self, x, y):
        return y * self.act_new(x) - self.act_erf(x) * y

    def functional_gelu(self, x, y):
        return F.gelu(x) * y + y * nn.functional.gelu(x)

    def functional_gelu_by_tanh(self, x, y):
        up, gate = self.up_proj(x), self.gate_proj(y)
        return up * F.gelu(gate, approximate="tanh") + F.gelu(gate, approximate="none") * up

    def functional_gelu_at_length(self, x, y):
        return (
            F.gelu(
                x,  # the gate
                approximate="tanh",
            )
            * y
        )

    def dropped_out(self, x, y):
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))

    def clamped(self, x, y):
        limit = 1.5
        return self.act_fn(x.clamp(max=limit)) * y.clamp(min=-limit, max=limit)

    def gate_up_split(self, x, y):
        gate, up = torch.cat([x, y], -1).split(8, dim=-1)
        return up * self.activation_fn(gate)

    def gate_up_sliced(self, x, y):
        gate_up = torch.cat([x, y], -1)
        return self.silu(gate_up[..., :8]) * gate_up[..., 8:]

    def w1_w3(self, x, y):
        w1, w2, w3 = self.gate_proj, self.down_proj, self.up_proj
        return w2(F.silu(w1(x)) * w3(x))

    def named(self, x, y):
        hidden_gelu = self.act_new(self.gate_proj(x))
        hidden_linear = self.up_proj(x)
        hidden_states = hidden_gelu * hidden_linear
        hidden_states = self.dropout(hidden_states)
        return self.down_proj(hidden_states)

    def named_other_way(self, x, y):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(self.up_proj(x) * gate)

    def named_three_times(self, x, y):
        gate = self.gate_proj(x)
        up = self.up_proj(y)
        gate = self.act(gate)
        up = gate * up
        gate = up + 1
        return gate, up

    def named_as_the_product(self, x, y):
        x = self.act_fn(x)
        x = x * y
        return self.down_proj(x) + x

    def named_at_length(self, x, y):
        gate: torch.Tensor = (
            self.act_fn(  # active
                x
            )
        )
        if y is None:
            y = x
        up = self.up_proj(
            y
        )

        return (
            up
            * gate  # and times
        )

    def named_continued(self, x, y):
        é = self.act_fn(x); "€"; z = 2 * (y \
            * é)
        return z

    def named_functional(self, x, y):
        gate = F.silu(x)
        return gate * self.up_proj(y)

    def named_by_tanh(self, x, y):
        gate = F.gelu(x, approximate="tanh")
        return gate * y

    def named_on_one_path(self, x, y):
        if x is not None:
            x = self.act_fn(x)
            x = x * y
        else:
            x = x + 1
        return x

    def named_in_a_loop(self, x, y):
        for layer in (self.gate_proj, self.up_proj):
            gate = layer(x)
            gate = self.act_fn(gate)
            x = gate * y
        return x

    def named_twice(self, x, y):
        a = self.act_fn(x)
        b = self.act(y)
        return a * b

    def two_of_them_named(self, x, y):
        a = self.act_fn(x)
        b = self.act(y)
        z = a * self.up_proj(y)
        return z + b * self.gate_proj(x)

    def named_and_nested(self, x, y):
        gate = self.act_fn(self.act(x) * y)
        return self.act(gate * y) * x

    def named_weight(self, x, y):  # <= gate and up differ in dtype or shape
        gate = self.act_fn(x)
        scale = y[:1, :1]
        return gate * scale

    def named_relu(self, x, y):  # <= the activation ReLU has no fused form
        gate = self.act_relu(x)
        up = self.up_proj(y)
        return gate * up

    def named_scalar(self, x, y):  # <= a factor is no tensor
        gate = self.act_fn(x)
        scale = 1.5
        return scale * gate

    def a_scalar(self, x, y):  # <= a factor is no tensor
        scale = 1.5
        return self.act_fn(x) * scale

    def none_at_all(self, x, y):  # <= a factor is no tensor
        try:
            return self.act_fn(x) * None_
        except TypeError:
            return x

    def no_activation(self, x, y):  # <= the activation NoneType has no fused form
        try:
            return self.act_none(x) * y
        except TypeError:
            return x

    def a_weight(self, x, y):  # <= gate and up differ in dtype or shape
        scale = y[:1, :1]
        return self.act_fn(x) * scale

    def another_activation(self, x, y):  # <= the activation ReLU has no fused form
        return self.act_relu(x) * y

    def in_place_activation(self, x, y):  # <= the activation works in place
        x = x * 1
        z = self.act_in_place(x) * x
        return z


class QkNormRope(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_norm, self.k_norm, self.__norm = (LlamaRMSNorm(8) for _ in range(3))
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 8)
        self.with_norms, self.without_norms = True, False
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def plain(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def k_first(self, q, k, cos, sin):
        k = self.k_norm(k).transpose(1, 2)
        q = self.q_norm(q).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def projected(self, q, k, cos, sin):
        x, shape = q.flatten(2), (*q.shape[:2], -1, 8)
        query_states = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        key_states = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        value_states = self.k_proj(x).view(shape).transpose(1, 2)
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        return query_states, key_states, value_states

    def one_norm(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.q_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def many_lines(self, q, k, cos, sin):
        q = self.q_norm(
            q  # of the heads
        ).transpose(1, 2)
        k = (
            self.k_norm(
                k
            )
            .transpose(
                1, 2
            )
        )
        q, k = apply_rotary_pos_emb(
            q,
            # and
            k, cos,
            sin,
        )
        return q, k

    def semicolons(self, q, k, cos, sin):
        q = self.q_norm(
            q
        ).transpose(1, 2); k = self.k_norm(k).transpose(1, 2); q, k = apply_rotary_pos_emb(q, k, cos, sin); return q, k

    def commented(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)  # (B, H, S, D)
        # and of k
        k = self.k_norm(k).transpose(1, 2)

        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # rotated
        return q, k

    def parentheses(self, q, k, cos, sin):
        (q) = ((self.q_norm((q))).transpose(1, 2))
        k = (self.k_norm)(k).transpose((1), 2)
        (q, k) = (apply_rotary_pos_emb((q), (k), cos, sin))
        return q, k

    def continued(self, q, k, cos, sin):
        q = \
            self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k) \
            .transpose(1, 2)
        q, k = \
            apply_rotary_pos_emb(q, k, \
                                 cos, sin)
        return q, k

    def annotated(self, q, k, cos, sin):
        q: torch.Tensor = self.q_norm(q).transpose(1, 2)
        k: torch.Tensor = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def non_ascii(self, q, k, cos, sin):
        ä = "é𝄞"; é = self.q_norm(q).transpose(1, 2); ß = self.k_norm(k).transpose(1, 2)
        "€"; é, ß = apply_rotary_pos_emb(é, ß, cos, sin); ä += "é"
        return é, ß

    def tabs(self, q, k, cos, sin):
    	if q is not None:
    		q = self.q_norm(q).transpose(1,	2)
    		k = self.k_norm(k).transpose(1, 2)
    		q, k = apply_rotary_pos_emb(q,	k, cos, sin)
    	return q, k

    def code_between(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        v = k.transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        both = cos, sin
        if self.training:
            v = v.contiguous()
        cos, sin = both
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k, v

    def expressions(self, q, k, cos, sin):
        q = self.q_norm(q * 2 + 1).transpose(1, 2)
        k = self.k_norm(k if self.training else -k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def a_lambda(self, q, k, cos, sin):
        heads = lambda states: states * 2
        q = self.q_norm(heads(q)).transpose(1, 2)
        k = self.k_norm((lambda: k_)() if (k_ := k) is None else k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def on_one_path(self, q, k, cos, sin):
        if cos is not None:
            q = self.q_norm(q).transpose(1, 2)
            k = self.k_norm(k).transpose(1, 2)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def used_later(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        q = q * 2
        k = k.mean(-1)
        return q, k

    def private(self, q, k, cos, sin):
        q = self.__norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def taken_names(self, q, k, cos, sin):
        qk_norm_rope_ = q
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k, qk_norm_rope_ * qk_norm_rope

    def norms_after_the_transposes(self, q, k, cos, sin):
        q = self.q_norm(q.transpose(1, 2))
        k = self.k_norm(k.transpose(1, 2))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def norms_after_the_transposes_in_steps(self, q, k, cos, sin):
        query_states = q.transpose(1, 2)
        key_states = k.transpose(1, 2)
        query_states = self.q_norm(query_states)
        key_states = self.k_norm(
            key_states  # of the heads
        )
        query_states, key_states = apply_rotary_pos_emb(
            query_states, key_states, cos,
            sin
        )
        return query_states, key_states

    def norms_before_the_transposes(self, q, k, cos, sin):
        q = self.q_norm(q)
        k = self.k_norm(k)
        v = cos + 1
        q = q.transpose(1, 2)
        k = k.transpose(
            2, 1
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k, v

    def norms_before_the_transposes_each(self, q, k, cos, sin):
        q = self.q_norm(q)
        q = q.transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def of_halves(self, q, k, cos, sin):
        both = torch.cat((q, k), 2)
        q, k = both.split([2, 1], dim=2)
        q, gate = torch.chunk(torch.cat((q, 2 * q), -1), 2, dim=-1)
        q = self.q_norm(q.transpose(1, 2))
        k = self.k_norm(k.transpose(1, 2))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q * gate.transpose(1, 2), k

    def angles_in_the_call(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        angles = {"cos": cos}
        q, k = apply_rotary_pos_emb(q, k, angles["cos"][..., :8], sin if sin is not None else cos)
        return q, k

    def norms_asked_for(self, q, k, cos, sin):
        if self.with_norms:  # some have none
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def norms_not_asked_for(self, q, k, cos, sin):  # <= the norms of q and k are not asked for
        if self.without_norms:
            k = self.k_norm(k)
            q = self.q_norm(q)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def norms_asked_for_after_the_transposes(self, q, k, cos, sin):
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        v = k * 2
        if (
            self.with_norms
            if cos is not None
            else self.without_norms
        ):
            q = self.q_norm(q)
            k = self.k_norm(k)
            v = self.k_norm(v)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k, v

    def norms_not_asked_for_after_the_transposes(self, q, k, cos, sin):  # <= the norms of q and k are not asked for
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        if self.without_norms:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def norms_asked_for_twice(self, q, k, cos, sin):
        a, b = k * 2, q * 3
        if self.with_norms:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if self.q_proj is not None:
            a = self.q_norm(a)
            b = self.k_norm(b)
        a = a.transpose(1, 2)
        b = b.transpose(1, 2)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        a, b = apply_rotary_pos_emb(a, b, cos, sin)
        return q, k, a, b

    def whole_norms_asked_for_before(self, q, k, cos, sin):
        if self.without_norms:
            q = self.q_norm(q.flatten(2))
            k = self.k_norm(k.flatten(2))
        q = q.view(*q.shape[:2], -1, 8)
        k = k.view(*k.shape[:2], -1, 8)
        if self.with_norms:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def rotary_on_some_paths(self, q, k, cos, sin):
        found = []
        for local in (True, False):
            a = self.q_norm(q).transpose(1, 2)
            b = self.k_norm(k).transpose(1, 2)
            if local:
                # with positions
                angles = cos, sin
                cos, sin = angles
                a, b = apply_rotary_pos_emb(a, b, cos, sin)
            found += [a, b]
        return found

    def rotary_on_some_paths_after_the_transposes(self, q, k, cos, sin):
        found = []
        for window in (None, 0, 4):
            b = self.k_norm(k.transpose(1, 2))
            a = self.q_norm(q.transpose(1, 2))
            v = q if window is None else k
            if window is None or window > 3:
                a, b = apply_rotary_pos_emb(a, b, cos, sin)
            found += [a, b, v]
        return found

    def rotary_on_some_paths_or_else(self, q, k, cos, sin):
        found = []
        for local in (True, False):
            a = self.q_norm(q).transpose(1, 2)
            b = self.k_norm(k).transpose(1, 2)
            if local if cos is not None else False:
                a, b = apply_rotary_pos_emb(a, b, cos, sin)
            elif k is None:
                a = b
            else:
                a, b = a * 2, b * 3
            found += [a, b]
        return found

    def rotary_and_norms_on_some_paths(self, q, k, cos, sin):
        found = []
        for local in (True, False):
            a = q * 1
            b = k * 1
            if self.with_norms:
                a = self.q_norm(a)
                b = self.k_norm(b)
            a = a.transpose(1, 2)
            b = b.transpose(1, 2)
            if local:
                a, b = apply_rotary_pos_emb(a, b, cos, sin)
            found += [a, b]
        return found

    def rotary_on_some_paths_without_norms(self, q, k, cos, sin):  # <= the norms of q and k are not asked for
        found = []
        for local in (True, False):
            a = q.transpose(1, 2)
            b = k.transpose(1, 2)
            if self.without_norms:
                a = self.q_norm(a)
                b = self.k_norm(b)
            if local:
                a, b = apply_rotary_pos_emb(a, b, cos, sin)
            found += [a, b]
        return found

    def positional(self, q, k, /, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k


class Softcap(nn.Module):
    def __init__(self, softcap: float):
        super().__init__()
        self.softcap = softcap

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(hidden_states / self.softcap) * self.softcap


class Configured(nn.Module):
    def get_decoder(self):
        return self.config


class HeadLoss(Configured):
    def __init__(self):
        super().__init__()
        self.lm_head, self.output = nn.Linear(8, 16, bias=False), nn.Linear(8, 16)
        self.scale, self.loss_function = 0.5, ForCausalLMLoss
        self.logit_softcap, self.soft_cap, self.inside = Softcap(2.0), nn.Tanh(), nn.Module()
        self.logit_scale = nn.Parameter(torch.tensor(0.5))
        self.heads = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.inside.lm_head = nn.Linear(8, 16, bias=False)
        self.config = SimpleNamespace(return_dict=True, vocab_size=16, cap=3.0, none=None, known=13)

    def plain(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def as_transformers_has_it(self, x, labels, **kwargs):
        keep = slice(-labels.shape[1], None)
        logits = self.lm_head(x[:, keep, :])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=None,
        )

    def by_place(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def other_names(self, x, target):
        scores = self.output(x)
        cost = self.loss_function(scores, target, self.config.vocab_size)
        return CausalLMOutputWithPast(logits=scores, loss=cost)

    def annotated(self, x, labels):
        logits: torch.Tensor = self.lm_head(x)
        loss: torch.Tensor | None = None
        if labels is not None:
            loss: torch.Tensor = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def divided(self, x, labels):
        logits = self.lm_head(x)
        logits = logits / self.scale
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def multiplied(self, x, labels):
        logits = self.lm_head(x)
        logits = logits * 1.5
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def multiplied_at_length(self, x, labels):
        logits = self.lm_head(x)
        logits = (
            logits  # times
            * self.scale
        )
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def capped(self, x, labels):
        logits = self.lm_head(x)
        if self.config.cap is not None:
            logits = logits / self.config.cap
            logits = torch.tanh(logits)
            logits = logits * self.config.cap
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def not_capped(self, x, labels):
        logits = self.lm_head(x)
        if self.config.none is not None:
            logits = logits / self.config.none
            logits = torch.tanh(logits)
            logits = logits * self.config.none
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def scaled_and_capped(self, x, labels):
        logits = self.lm_head(x)
        logits = logits * self.scale  # first
        if self.config.cap is not None:
            # then
            logits = logits / self.config.cap
            logits = torch.tanh(logits)
            logits = logits * self.config.cap
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def many_lines(self, x, labels):
        logits = self.lm_head(
            # the states
            x
        )
        loss = self.loss_function(

            logits,
            labels,
            16,
        )
        return CausalLMOutputWithPast(

            loss=loss, logits=logits
        )

    def parentheses(self, x, labels):
        (logits) = ((self.lm_head)((x)))
        loss = (self.loss_function((logits), (labels), 16))
        return (CausalLMOutputWithPast)(loss=(loss), logits=(logits))

    def continued(self, x, labels):
        logits = \
            self.lm_head(x)
        loss = self.loss_function(logits, \
                                  labels, 16)
        return \
            CausalLMOutputWithPast(loss=loss, logits=logits)

    def one_line(self, x, labels):
        logits = self.lm_head(x); loss = self.loss_function(logits, labels, 16); return CausalLMOutputWithPast(loss=loss, logits=logits)

    def non_ascii(self, x, labels):
        ä = "é𝄞"; é = self.lm_head(x); ß = self.loss_function(logits=é, labels=labels, vocab_size=16)
        "€"; return CausalLMOutputWithPast(loss=ß, logits=é)

    def tabs(self, x, labels):
    	logits = self.lm_head(x)
    	if labels is not None:
    		loss = self.loss_function(logits,	labels, 16)
    	return CausalLMOutputWithPast(loss=loss,	logits=logits)

    def two_stars_first(self, x, labels):
        more = {"vocab_size": 16}
        past = {"past_key_values": None}
        logits = self.lm_head(x)
        loss = self.loss_function(**more, logits=logits, labels=labels)
        return CausalLMOutputWithPast(**past, loss=loss, logits=logits)

    def with_a_router_loss(self, x, labels):
        logits = self.lm_head(x)
        loss = None
        aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, 16)
            loss += self.scale * x.square().mean().to(loss.device)
        aux_loss = x.mean()
        if aux_loss is not None:
            loss = loss + aux_loss
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def weighed(self, x, labels):
        logits = self.lm_head(x)
        loss = 0.5 * self.loss_function(logits, labels, 16) + x.mean()
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def expressions(self, x, labels):
        logits = self.lm_head(x * 2 if self.training else x)
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(x,))

    def taken_names(self, x, labels):
        fused_loss_ = fused_loss
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 16) * fused_loss_
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def upcast(self, x, labels):
        logits = self.lm_head(x).float()
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def upcast_between(self, x, labels):
        logits = self.lm_head(x)
        logits = logits.float()
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def upcast_by_name(self, x, labels):
        logits = self.lm_head(x).to(torch.float32)
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def dense(self, x, labels):
        logits = self.lm_head(x).contiguous()
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def multiplied_at_once(self, x, labels):
        logits = self.lm_head(x) * self.scale
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def multiplied_from_the_left(self, x, labels):
        logits = 2 * self.scale * self.lm_head(
            x  # the states
        ) / 3.0
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def cast_before_and_after(self, x, labels):
        logits = self.lm_head(x.to(self.lm_head.weight.dtype)).float()
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def upcast_and_capped(self, x, labels):
        logits = self.lm_head(x)
        if self.config.cap is not None:
            # in float32
            logits = logits.float() / self.config.cap
            logits = torch.tanh(logits)
            logits = logits * self.config.cap
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def always_capped(self, x, labels):
        logits = self.lm_head(x)
        logits = logits * self.scale

        logits = logits / self.config.cap
        logits = torch.tanh(logits)
        logits = logits * self.config.cap
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def capped_in_one_line(self, x, labels):
        logits = self.lm_head(x)
        cap = self.config.cap
        logits = nn.functional.tanh(logits / cap) * cap
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def capped_by_a_method(self, x, labels):
        logits = self.lm_head(x)
        logits = (logits / self.config.cap).tanh() * self.config.cap
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def capped_by_a_module(self, x, labels):
        logits = self.lm_head(x).float()
        logits = self.logit_softcap(logits)
        loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def capped_by_another_module(self, x, labels):  # <= logits changed in a way that the op does not know
        logits = self.lm_head(x)
        logits = self.soft_cap(logits)
        logits = logits * 2
        loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def capped_by_a_walrus(self, x, labels):
        logits = self.lm_head(x)
        if (cap := self.get_decoder().cap) is not None:
            logits = logits / cap
            logits = torch.tanh(logits)
            logits = logits * cap
        loss = self.loss_function(logits, labels, self.get_decoder().vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def capped_by_a_local_name(self, x, labels):
        logits = self.lm_head(x)
        config = self.get_decoder()
        cap = getattr(config, "cap", None)
        if cap is not None:
            logits = logits / cap
            logits = torch.tanh(logits)
            logits = logits * cap
        loss = self.loss_function(logits, labels, config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def scaled_after_the_cap(self, x, labels):  # <= logits changed in a way that the op does not know
        logits = self.lm_head(x)
        logits = torch.tanh(logits / 3) * 3
        logits = logits * 2
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def another_cap(self, x, labels):  # <= logits changed in a way that the op does not know
        logits = self.lm_head(x)
        logits = torch.tanh(logits / 3) * 4
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def only_tanh(self, x, labels):  # <= logits changed in a way that the op does not know
        logits = self.lm_head(x).tanh()
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def scaled_by_a_weight(self, x, labels):  # <= logits changed in a way that the op does not know
        logits = self.lm_head(x)
        logits = logits * self.logit_scale
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def scaled_by_none(self, x, labels):
        logits = self.lm_head(x)
        if self.config.none is not None:
            logits = logits * self.config.none
        elif self.config.cap is not None:
            logits = logits / self.config.cap
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def without_the_padding(self, x, labels):
        logits = self.lm_head(x)
        known = self.config.known
        if known is not None and known < logits.shape[-1]:
            logits = logits[..., :known]
        loss = self.loss_function(logits=logits, labels=labels % 13, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def without_more_than_there_is(self, x, labels):
        logits = self.output(x)
        logits = logits[..., :100]
        loss = self.loss_function(logits, labels, logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def without_the_last(self, x, labels):  # <= logits changed in a way that the op does not know
        logits = self.lm_head(x)
        logits = logits[..., :-3]
        loss = self.loss_function(logits, labels % 13, logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def of_a_list_of_heads(self, x, labels):
        step = 1
        logits = self.heads[step](x)
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def of_a_module_inside(self, x, labels):
        logits = self.inside.lm_head(x)
        loss = self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def labels_moved(self, x, labels):
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            loss = self.loss_function(logits, labels.contiguous(), 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def labels_of_one_column(self, x, labels):
        labels = labels[..., None]
        logits = self.lm_head(x)
        if labels is not None:
            first = labels[:, :, 0]
            loss = self.loss_function(logits=logits, labels=first, vocab_size=16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def labels_that_are_shifted(self, x, labels, shift_labels=None):
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=None,
                vocab_size=16,
                shift_labels=shift_labels if shift_labels is not None else labels,
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def shifted_labels_popped(self, x, labels, **kwargs):
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            shift_labels = kwargs.pop("shift_labels", labels)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=16, shift_labels=shift_labels, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def a_tuple_on_request(self, x, labels, return_dict=True):
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, 16)
        if not return_dict:
            output = (logits,) + (x,)
            return ((loss,) + output) if loss is not None else output
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def a_tuple_in_any_case(self, x, labels, return_dict=False):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 16)
        if not return_dict:
            logits.device; output = {"loss": loss, "logits": logits}
            return output
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def used_on_a_branch(self, x, labels):
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, 16)
            if self.scale > 0:
                z_loss = logits.logsumexp(dim=-1).to(dtype=loss.dtype).pow(2).mean()
                loss = loss + self.scale * z_loss
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def output_in_a_name(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 16)
        lm_outputs = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
        )
        return lm_outputs

    def added_in_place(self, x, labels):
        loss = x.mean()
        logits = self.lm_head(x)
        loss += self.loss_function(logits, labels, 16)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def shifted_labels(self, x, labels):
        logits = self.lm_head(x[:, :-1])
        loss = self.loss_function(logits, labels, 16, shift_labels=labels[:, 1:].contiguous())
        return CausalLMOutputWithPast(loss=loss, logits=logits)
