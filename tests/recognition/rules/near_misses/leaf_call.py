"""Calls of the rotary function that stay as they are. See the package."""
# ruff: noqa
# fmt: off

from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class Cases(nn.Module):
    def a_local_name(self, q, k, cos, sin):
        apply_rotary_pos_emb = self.rotary
        return apply_rotary_pos_emb(q, k, cos, sin)  # <- apply_rotary_pos_emb is a local name

    def imported_inside(self, q, k, cos, sin):
        from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

        return apply_rotary_pos_emb(q, k, cos, sin)  # <- apply_rotary_pos_emb is a local name

    def a_function_inside(self, q, k, cos, sin):
        def apply_rotary_pos_emb(*given):
            return given

        return apply_rotary_pos_emb(q, k, cos, sin)  # <- apply_rotary_pos_emb is a local name

    def an_argument(self, q, k, cos, sin, apply_rotary_pos_emb=None):
        return apply_rotary_pos_emb(q, k, cos, sin)  # <- apply_rotary_pos_emb is a local name

    def an_attribute(self, q, k, cos, sin):  # <~ no code that the rule rope.full knows
        return self.apply_rotary_pos_emb(q, k, cos, sin)

    def an_annotation(self, q, k: apply_rotary_pos_emb, cos, sin):  # <~ no code that the rule rope.full knows
        return q, k

    @staticmethod
    def static(q, k, cos, sin):  # <- it is no method
        return apply_rotary_pos_emb(q, k, cos, sin)

    def names_read(self, q, k, cos, sin):
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return len(locals())  # <- locals() sees its local names
