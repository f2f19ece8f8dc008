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
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- k is computed with in line {-1}, after its norm
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
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q of line {-2} is no self.norm(heads) of heads
        return q, k

    def other_shape_after_the_norm(self, q, k, cos, sin):
        q = self.q_norm(q.flatten(2))  # of all heads at once
        k = self.k_norm(k.flatten(2))
        q = q.view(*cos.shape[:2], -1, 8).transpose(1, 2)
        k = k.view(*cos.shape[:2], -1, 8).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is computed with in line {-2}, after its norm
        return q, k

    def transposed_twice(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q = q.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is transposed twice
        return q, k

    def transposed_as_another(self, q, k, cos, sin):
        q = self.q_norm(q)
        k = self.k_norm(k)
        heads = q.transpose(1, 2)
        k = k.transpose(1, 2)
        q = heads
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q of line {-1} is no self.norm(heads) of heads
        return q, k

    def transposed_in_other_orders(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k.transpose(1, 2))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- the norms of q and k stand in other places
        return q, k

    def used_before_the_transpose(self, q, k, cos, sin):
        q = self.q_norm(q)
        k = self.k_norm(k)
        v = k
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is used in line {-1}, between its norm and the rotary function
        return q, k, v

    def asked_for_one(self, q, k, cos, sin):
        q = q.transpose(1, 2)
        k = self.k_norm(k.transpose(1, 2))
        if self.use_qk_norm:
            q = self.q_norm(q)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- the norms of q and k stand in other places
        return q, k

    def asked_for_apart(self, q, k, cos, sin):
        if self.use_q_norm:
            q = self.q_norm(q)
        if self.use_k_norm:
            k = self.k_norm(k)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- the norms of q and k stand in other places
        return q, k

    def asked_for_or_else(self, q, k, cos, sin):
        if self.use_qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        else:
            q, k = q * 2, k * 2
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is used in line {-4}, between its norm and the rotary function
        return q, k

    def asked_for_of_something_else(self, q, k, cos, sin):
        if self.use_qk_norm:
            q = self.q_norm(q * 2)
            k = self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is used in line {-2}, between its norm and the rotary function
        return q, k

    def asked_for_with_more(self, q, k, cos, sin):
        if self.use_qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
            cos = cos * 2
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is used in line {-3}, between its norm and the rotary function
        return q, k

    def asked_for_in_turns(self, q, k, cos, sin):
        if self.use_qk_norm:
            q = self.q_norm(q)
            q = self.k_norm(q)
            k = self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is used in line {-3}, between its norm and the rotary function
        return q, k

    def rotary_in_one_case_of_q(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        if q.dim() == 4:
            q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is used in line {-1}, between its norm and the rotary function
        return q, k

    def rotary_in_the_other_case(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        if self.training:
            v = cos
        else:
            q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q comes from elsewhere
        return q, k

    def rotary_after_other_use(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        if self.training:
            v = k.mean()
            q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- k is used in line {-1}, between its norm and the rotary function
        return q, k

    def rotary_two_conditions_in(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        if self.training:
            if cos is not None:
                q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q comes from elsewhere
        return q, k

    def rotary_in_a_loop(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        for _ in cos:
            q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q comes from elsewhere
        return q, k

    def norm_on_the_same_path_alone(self, q, k, cos, sin):
        k = self.k_norm(k).transpose(1, 2)
        if self.training:
            q = self.q_norm(q).transpose(1, 2)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- k comes from elsewhere
        return q, k

    def out_of_a_loop(self, q, k, cos, sin):
        for one in cos:
            q = self.q_norm(q).transpose(1, 2)
            k = self.k_norm(k).transpose(1, 2)
            if one is None:
                break
            q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- line {-1} may leave a loop before the rotary function
        return q, k

    def after_an_error(self, q, k, cos, sin):
        try:
            q = self.q_norm(q).transpose(1, 2)
            k = self.k_norm(k).transpose(1, 2)
            cos, sin = self.angles
            q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- it stands under try, where q and k may be used after an error
        except AttributeError:
            pass
        return q, k

    def q_named_among_the_angles(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin if (cos := q) is None else sin)  # <- the rotary function takes something else than q, k, cos and sin
        return q, k

    def q_among_the_angles(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin[:, : q.shape[2]])  # <- the rotary function takes something else than q, k, cos and sin
        return q, k

    def q_alone(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = k.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- k is transposed, and no norm of it stands before
        return q, k

    def norm_on_one_path(self, q, k, cos, sin):
        k = self.k_norm(k).transpose(1, 2)
        if self.training:
            q = self.q_norm(q).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q is used in line {-1}, between its norm and the rotary function
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
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # <- q of line {-2} is no self.norm(heads) of heads
        return q, k

    def frame_read(self, q, k, cos, sin):
        q = self.q_norm(q).transpose(1, 2)
        k = self.k_norm(k).transpose(1, 2)
        names = inspect.currentframe().f_locals  # <- inspect.currentframe() sees its local names
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k, names
