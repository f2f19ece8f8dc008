"""Activations in products that may not become gated products. See the package."""
# ruff: noqa
# fmt: off

import torch
from torch import nn
from torch.nn import functional as F


class Cases(nn.Module):
    def times_a_number(self, x, y):
        return self.act_fn(x) * 2.0  # <- the activation is multiplied by a number

    def a_number_times(self, x, y):
        return -0.5 * self.act_fn(x)  # <- the activation is multiplied by a number

    def times_a_computed_number(self, x, y):
        return self.act_fn(x) * (2 * self.scale)  # <- the activation is multiplied by a number

    def times_an_attribute(self, x, y):
        return self.act_fn(x) * self.scale  # <- self.scale may be a number or a weight

    def times_a_setting(self, x, y):
        return self.config.alpha * self.act_fn(x)  # <- self.config.alpha may be a number or a weight

    def both_active(self, x, y):
        return self.act_fn(x) * self.act_fn(y)  # <- both factors are activations

    def two_arguments(self, x, y):
        return self.act_fn(x, 1.702) * y  # <- the activation takes more than one argument

    def an_option(self, x, y):
        return F.silu(x, inplace=True) * y  # <- the activation takes more than one argument

    def by_keyword(self, x, y):
        return F.silu(input=x) * y  # <- the activation takes more than one argument

    def starred(self, x, y):
        return self.act_fn(*x) * y  # <- the activation takes more than one argument

    def other_factor_in_place(self, x, y):
        return self.act_fn(x) * x.add_(1)  # <- a factor changes something

    def argument_in_place(self, x, y):
        return x * self.act_fn(x.mul_(2))  # <- a factor changes something

    def other_factor_written(self, x, y):
        return self.act_fn(x) * torch.add(x, y, out=x)  # <- a factor changes something

    def walrus(self, x, y):
        return self.act_fn(x) * (x := y)  # <- a factor changes something

    def no_product(self, x, y):  # <~ no code that the rule gated_product knows
        return self.act_fn(x) + y

    def in_place_product(self, x, y):  # <~ no code that the rule gated_product knows
        x = self.act_fn(x)
        x *= y
        return x

    def matrix_product(self, x, y):  # <~ no code that the rule gated_product knows
        return self.act_fn(x) @ y

    def product_later(self, x, y):  # <~ no code that the rule gated_product knows
        gate = self.act_fn(x)
        return gate * y

    def changed_before(self, x, y):  # <~ no code that the rule gated_product knows
        return self.act_fn(x).clamp(min=0) * y

    def another_call(self, x, y):  # <~ no code that the rule gated_product knows
        return self.factor(x) * y

    def in_an_f_string(self, x, y):  # <~ no code that the rule gated_product knows
        return f"é {self.act_fn(x) * y}"

    def names_read(self, x, y):
        z = self.act_fn(x) * y
        return z, dir()  # <- dir() sees its local names

    @staticmethod
    def static(x, y):  # <- it is no method
        return F.silu(x) * y

    def generator(self, x, y):
        yield self.act_fn(x) * y  # <- it is a generator
