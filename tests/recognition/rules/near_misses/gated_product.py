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

    def another_option(self, x, y):
        return F.gelu(x, approximate=self.how) * y  # <- the activation takes more than one argument

    def gelu_by_keyword(self, x, y):
        return y * F.gelu(input=x, approximate="tanh")  # <- the activation takes more than one argument

    def silu_by_tanh(self, x, y):
        return F.silu(x, approximate="tanh") * y  # <- the activation takes more than one argument

    def named_times_a_number(self, x, y):
        gate = self.act_fn(x)
        return 2.0 * gate  # <- the activation is multiplied by a number

    def named_times_an_attribute(self, x, y):
        gate = self.act_fn(x)
        return gate * self.scale  # <- self.scale may be a number or a weight

    def named_and_used_again(self, x, y):
        gate = self.act_fn(x)
        z = gate * y
        return z, gate  # <~ line {-1}: gate is used in line

    def named_and_used_before(self, x, y):  # <~ no code that the rule gated_product knows
        gate = self.act_fn(x)
        kept = gate
        return kept, gate * y

    def named_and_used_in_the_statement(self, x, y):
        gate = self.act_fn(x)
        return gate * y + gate  # <- gate is used in line

    def named_and_used_by_its_factor(self, x, y):
        gate = self.act_fn(x)
        return gate * self.up_proj(gate)  # <- gate is used in line

    def named_and_squared(self, x, y):
        gate = self.act_fn(x)
        return gate * gate  # <- gate is used in line

    def named_and_used_in_the_next_value(self, x, y):
        gate = self.act_fn(x)
        z = gate * y
        gate = gate + 1  # <~ line {-1}: gate is used in line
        return z, gate

    def named_and_added_to(self, x, y):
        gate = self.act_fn(x)
        z = gate * y
        gate += 1  # <~ line {-1}: gate is used in line
        return z, gate

    def named_and_told(self, x, y):
        gate = self.act_fn(x)
        z = gate * y
        print(f"{gate.shape}")  # <~ line {-1}: gate is used in line
        return z

    def named_and_captured(self, x, y):
        gate = self.act_fn(x)
        again = lambda: gate
        gate = self.act_fn(x)
        return gate * y, again  # <- gate is no name of this function alone

    def named_and_global(self, x, y):
        global gate
        gate = self.act_fn(x)
        return gate * y  # <- gate is no name of this function alone

    def named_in_a_comprehension(self, x, y):
        gate = self.act_fn(x)
        return [gate * one for one in y]  # <- gate may be used more than once, or not at all

    def named_in_a_branch(self, x, y):
        gate = self.act_fn(x)
        if y is not None:
            x = gate * y  # <- gate may be used more than once, or not at all
        return x

    def named_and_changed(self, x, y):
        gate = self.act_fn(x)
        x.mul_(2)
        return gate * y  # <- line {-1} changes something after the activation

    def named_and_added_between(self, x, y):
        gate = self.act_fn(x)
        x += 2
        return gate * y  # <- line {-1} changes something after the activation

    def named_and_changed_by_the_factor(self, x, y):
        gate = self.act_fn(x)
        return gate * x.add_(y)  # <- line

    def named_in_a_round_before(self, x, y):
        for _ in range(2):
            x = x + y
            gate = self.act_fn(gate)
            x = gate * y  # <- gate is used in line {-1} too
        return x

    def named_and_used_after_the_loop(self, x, y):
        for _ in range(2):
            gate = self.act_fn(x)
            x = gate * y
        return x, gate  # <~ line {-1}: gate is used in line

    def named_and_used_after_an_exception(self, x, y):
        gate = x
        try:
            gate = self.act_fn(gate)
            x = gate * y  # <- gate is used in line
        except ValueError:
            return gate
        return x

    def named_under_suppress(self, x, y):
        with suppress(ValueError):
            gate = self.act_fn(x)
            gate = gate * y
        return gate  # <~ line {-1}: gate is used in line

    def named_and_given_another_value(self, x, y):  # <~ no code that the rule gated_product knows
        gate = self.act_fn(x)
        gate = self.dropout(gate)
        return gate * y

    def named_on_one_path(self, x, y):  # <~ no code that the rule gated_product knows
        if y is None:
            x = self.act_fn(x)
        return x * y

    def named_among_others(self, x, y):  # <~ no code that the rule gated_product knows
        gate, up = self.act_fn(x), y
        return gate * up

    def named_and_clamped(self, x, y):  # <~ no code that the rule gated_product knows
        gate = self.act_fn(x).clamp(max=7.0)
        return gate * y

    def sigmoid(self, x, y):  # <~ no code that the rule gated_product knows
        return x * torch.sigmoid(x)

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
