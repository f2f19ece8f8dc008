"""Norms of q and k that have to stay before the rotary function. See the package."""
# ruff: noqa
# fmt: off

import inspect

from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class Cases(nn.Module):
    def used_between(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        seen = q.mean()
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is used in line {-1}, between its norm and the rotary function
        return q, k, seen

    def scaled_between(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        k = k * 2
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- k of line {-1} is no self.norm(heads).transpose(1, 2)
        return q, k

    def reassigned_on_one_path(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        if self.training:
            k = k.detach()
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- k is used in line {-1}, between its norm and the rotary function
        return q, k

    def heads_changed_between(self, q, k, cos, sin):
        heads = q
        q = self.q_norm(heads).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        heads.zero_()
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- line {-1} changes something between a norm and the rotary function
        return q, k

    def heads_written_between(self, q, k, cos, sin):
        heads = q
        q = self.q_norm(heads).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        heads[0] = 0
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- line {-1} changes something between a norm and the rotary function
        return q, k

    def norm_replaced_between(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        self.q_norm = self.k_norm
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- line {-1} changes something between a norm and the rotary function
        return q, k

    def other_axes(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 3)
        k = self.k_norm(k).transpose(1, 3)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q of line {-2} is no self.norm(heads).transpose(1, 2)
        return q, k

    def norm_after_the_transpose(self, q, k, cos, sin):
        q = self.q_norm(q.transpose(1, 2))
        k = self.k_norm(k.transpose(1, 2))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q of line {-2} is no self.norm(heads).transpose(1, 2)
        return q, k

    def in_two_steps(self, q, k, cos, sin):
        q = self.q_norm(q)
        k = self.k_norm(k)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q of line {-2} is no self.norm(heads).transpose(1, 2)
        return q, k

    def q_alone(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = k.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- k of line {-1} is no self.norm(heads).transpose(1, 2)
        return q, k

    def norm_on_one_path(self, q, k, cos, sin):
        k = self.k_norm(k).transpose(1, 2)
        if self.training:
            q = self.q_norm(q).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is used in line {-1}, between its norm and the rotary function
        return q, k

    def rotary_on_one_path(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        if cos is not None:
            q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q comes from elsewhere
        return q, k

    def five_arguments(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, 1)  # <- the rotary function takes something else than q, k, cos and sin
        return q, k

    def by_keyword(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos=cos, sin=sin)  # <- the rotary function takes something else than q, k, cos and sin
        return q, k

    def starred(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *(cos, sin))  # <- the rotary function takes something else than q, k, cos and sin
        return q, k

    def results_swapped(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        k, q = apply_rotary_pos_emb(q, k, cos, sin)  # <- the rotary function's results go elsewhere than to q and k
        return q, k

    def results_elsewhere(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        a, b = apply_rotary_pos_emb(q, k, cos, sin)  # <- the rotary function's results go elsewhere than to q and k
        return a + q, b + k

    def results_returned(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        return apply_rotary_pos_emb(q, k, cos, sin)  # <- the rotary function's results go elsewhere than to q and k

    def results_in_an_expression(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q = apply_rotary_pos_emb(q, k, cos, sin)[0]  # <- the rotary function's results go elsewhere than to q and k
        return q, k

    def the_same_twice(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        q, q = apply_rotary_pos_emb(q, q, cos, sin)  # <- the rotary function's results go elsewhere than to q and k
        return q, k

    def seen_by_a_closure(self, q, k, cos, sin):
        peek = lambda: q
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        seen = peek()
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is no name of this function alone
        return q, k, seen

    def norm_with_a_second_argument(self, q, k, cos, sin):
        q = self.q_norm(q, 1).transpose(1, 2)
        k = self.k_norm(k, 1).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q of line {-2} is no self.norm(heads).transpose(1, 2)
        return q, k

    def frame_read(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        names = inspect.currentframe().f_locals  # <- inspect.currentframe() sees its local names
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k, names
