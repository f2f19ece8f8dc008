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


class GatedProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.act_fn, self.act, self.__act = ACT2FN["silu"], nn.SiLU(), nn.SiLU()
        self.activation_fn, self.hidden_act = nn.SiLU(), ACT2FN["gelu_pytorch_tanh"]
        self.act_relu, self.act_in_place = nn.ReLU(), nn.SiLU(inplace=True)
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

    def a_scalar(self, x, y):  # <= a factor is no tensor
        scale = 1.5
        return self.act_fn(x) * scale

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

    def positional(self, q, k, /, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k


class HeadLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head, self.output = nn.Linear(8, 16, bias=False), nn.Linear(8, 16)
        self.scale, self.loss_function = 0.5, ForCausalLMLoss
        self.config = SimpleNamespace(return_dict=True, vocab_size=16, cap=3.0, none=None)

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

    def shifted_labels(self, x, labels):
        logits = self.lm_head(x[:, :-1])
        loss = self.loss_function(logits, labels, 16, shift_labels=labels[:, 1:].contiguous())
        return CausalLMOutputWithPast(loss=loss, logits=logits)
