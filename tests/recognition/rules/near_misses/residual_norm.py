"""Sums and norms that may not become one. See the package."""
# ruff: noqa
# fmt: off

import sys

import torch
from torch import nn

shared = None


def spied(function):
    def call(*args):
        return function(*args)

    return call


class Cases(nn.Module):
    def used_before_the_norm(self, x, y):
        x = x + y
        z = x * 2  # <- between the sum and its norm stands other code
        return self.norm(x), z

    def printed_before_the_norm(self, x, y):
        x = x + y
        print(x.shape)  # <- between the sum and its norm stands other code
        x = self.norm(x)
        return x

    def in_place(self, x, y):
        x += y  # <- the sum is in place
        z = self.norm(x)
        return x, z

    def in_place_after_the_sum(self, x, y):
        s = x + y
        s += x  # <- the sum is in place
        z = self.norm(s)
        return s, z

    def changed_between(self, x, y):
        s = x + y
        s.mul_(2)  # <- between the sum and its norm stands other code
        z = self.norm(s)
        return s, z

    def hook_between(self, x, y):
        s = x + y
        s.register_hook(self.seen)  # <- between the sum and its norm stands other code
        z = self.norm(s)
        return s, z

    def call_between(self, x, y):
        s = x + y
        kept = self.mlp(x)  # <- between the sum and its norm stands other code
        z = self.norm(s)
        return kept, z

    def norm_with_a_second_argument(self, x, y):
        s = x + y
        z = self.norm(s, y)  # <- the norm takes more than the sum
        return s, z

    def norm_with_an_option(self, x, y):
        s = x + y
        z = self.norm(s, residual=y)  # <- the norm takes more than the sum
        return s, z

    def norm_by_keyword(self, x, y):
        s = x + y
        z = self.norm(hidden_states=s)  # <- the norm takes the sum by keyword
        return s, z

    def norm_after_a_product(self, x, y):
        s = x + y
        z = 2 * x * self.norm(s)  # <- other code runs between the sum and its norm
        return s, z

    def norm_after_a_call(self, x, y):
        s = x + y
        return self.mlp(s)(self.norm(s))  # <- other code runs between the sum and its norm

    def norm_after_another(self, x, y):
        s = x + y
        z = self.mlp(self.other(x), self.norm(s))  # <- other code runs between the sum and its norm
        return s, z

    def norm_in_one_case(self, x, y):
        s = x + y
        z = self.norm(s) if self.training else s  # <- other code runs between the sum and its norm
        return s, z

    def norm_if_need_be(self, x, y):
        s = x + y
        z = self.training and self.norm(s)  # <- other code runs between the sum and its norm
        return s, z

    def norm_called_later(self, x, y):
        s = x + y
        z = lambda: self.norm(s)  # <- other code runs between the sum and its norm
        return s, z()

    def norms_of_many(self, x, y):
        s = x + y
        z = [self.norm(s) for _ in y]  # <- other code runs between the sum and its norm
        return s, z

    def sum_changed_after_its_norm(self, x, y):
        s = x + y
        z = self.norm(s)  # <- s is changed in place after its norm
        s += 1
        return s, z

    def sum_changed_by_its_norm(self, x, y):
        s = x + y
        s += self.norm(s)  # <- s is changed in place after its norm
        return s

    def sum_written_into(self, x, y):
        s = x + y
        kept = s
        z = self.norm(kept)  # <- kept is changed in place after its norm
        kept[0] = z[0]
        return s, z

    def sum_scaled_in_place(self, x, y):
        s = x + y
        z = self.norm(s)  # <- s is changed in place after its norm
        return s.mul_(2), z

    def sum_changed_elsewhere_as_well(self, x, y):
        s = x + y
        if self.deep:
            z = self.norm(s)  # <- s is changed in place after its norm
        else:
            z = s
        s += 1
        return s, z

    def condition_of_the_sum(self, x, y):
        s = x + y
        if s.mean() > 0:  # <- the norm stands in another block than the sum
            s = self.norm(s)
        return s

    def condition_named_after_the_sum(self, x, y):
        s = x + y
        deep = s
        if deep is not None:  # <- the norm stands in another block than the sum
            s = self.norm(s)
        return s

    def condition_in_the_sum(self, x, y):
        s = x + (deep := y)
        if deep is not None:  # <- the norm stands in another block than the sum
            s = self.norm(s)
        return s

    def norm_in_the_other_case(self, x, y):
        s = x + y
        if self.deep:  # <- the norm stands in another block than the sum
            z = s
        else:
            z = self.norm(s)
        return s, z

    def norm_late_under_a_condition(self, x, y):
        s = x + y
        if self.deep:  # <- the norm stands in another block than the sum
            z = self.mlp(x)
            s = self.norm(s)
        return s

    def sum_in_the_norm_with_an_option(self, x, y):
        z = self.norm(x + y, residual=y)  # <- the norm takes more than the sum
        return z

    def sum_in_the_norm_by_keyword(self, x, y):
        z = self.norm(hidden_states=x + y)  # <- the sum has no statement of its own
        return z

    def norm_before_the_sum(self, x, y):
        y = self.norm(y)
        x = x + y  # <- the norm comes before the sum (post-norm)
        return x

    def norm_before_the_sum_on_the_left(self, x, y):
        y = self.norm(y)
        x = y + x  # <- the norm comes before the sum (post-norm)
        return x

    def norm_of_another_name(self, x, y):  # <~ no code that the rule residual_norm knows
        s = x + y
        z = self.norm(x)
        return s, z

    def sum_given_away(self, x, y):
        s = x + y
        s = x  # <- s gets another value before the norm
        z = self.norm(s)
        return s, z

    def sum_on_every_path(self, x, y):
        if x.dim() == 2:
            s = y + x
        else:
            s = x + y  # <- the norm stands in another block than the sum
        z = self.norm(s)
        return s, z

    def sum_on_one_path(self, x, y):
        if x.dim() == 2:
            s = x + y
        else:
            s = x - y  # <- s gets another value before the norm
        z = self.norm(s)
        return s, z

    def reassigned_on_one_path(self, x, y):
        s = x + y
        if x.dim() == 3:
            s = x  # <- s gets another value before the norm
        z = self.norm(s)
        return s, z

    def norm_on_one_path(self, x, y):
        s = x + y
        if x.dim() == 3:  # <- the norm stands in another block than the sum
            s = self.norm(s)
        return s

    def norm_in_a_loop(self, x, y):
        s = x + y
        for _ in range(3):  # <- the norm stands in another block than the sum
            s = self.norm(s)
        return s

    def norm_under_with(self, x, y):
        s = x + y
        with torch.no_grad():  # <- the norm stands in another block than the sum
            z = self.norm(s)
        return s, z

    def norm_of_a_list(self, x, y):  # <~ no code that the rule residual_norm knows
        s = x + y
        for layer in self.norms:
            s = layer(s)
        return s

    def walrus(self, x, y):
        z = self.norm(s := x + y)  # <- the sum has no statement of its own
        return s, z

    def in_a_function_inside(self, x, y):
        def both():
            s = x + y  # <- the norm stands in another block than the sum
            z = self.norm(s)
            return s, z

        return both()

    def two_targets(self, x, y):
        s = kept = x + y  # <- the sum is not given one name
        z = self.norm(s)
        return kept, z

    def starred(self, x, y):
        *s, = x + y  # <- the sum is not given one name
        z = self.norm(s)
        return s, z

    def difference(self, x, y):  # <~ no code that the rule residual_norm knows
        s = x - y
        z = self.norm(s)
        return s, z

    def of_another_object(self, other, x, y):  # <~ no code that the rule residual_norm knows
        s = x + y
        z = other.norm(s)
        return s, z

    def global_sum(self, x, y):
        global shared  # some other function may read it
        shared = x + y
        z = self.norm(shared)  # <- shared is no name of this function alone
        return z

    def sum_in_a_closure(self, x, y):
        def peek():
            return s

        s = x + y
        z = self.norm(s)  # <- s is no name of this function alone
        return peek(), z

    def annotation_in_parentheses(self, x, y):
        s: (torch.Tensor) = x + y  # <- the annotation stands in parentheses
        z = self.norm(s)
        return s, z

    def names_read(self, x, y):
        s = x + y
        z = self.norm(s)
        return sorted(locals()), z  # <- locals() sees its local names

    def names_read_by_vars(self, x, y):
        s = x + y
        z = self.norm(s)
        return s, z, len(vars())  # <- vars() sees its local names

    def run_text(self, x, y):
        s = x + y
        exec("s = x")  # <- exec('s = x') sees its local names
        z = self.norm(s)
        return z

    def evaluated_text(self, x, y):
        s = x + y
        z = self.norm(s)
        return eval("s"), z  # <- eval('s') sees its local names

    def frame_read(self, x, y):
        s = x + y
        z = self.norm(s)
        return sys._getframe().f_locals, z  # <- sys._getframe() sees its local names

    def generator(self, x, y):
        s = x + y
        z = self.norm(s)
        yield s, z  # <- it is a generator

    async def coroutine(self, x, y):  # <~ is asynchronous
        s = x + y
        z = self.norm(s)
        return s, z

    @staticmethod
    def static(x, y):  # <- it is no method
        s = x + y
        z = norm(s)
        return s, z

    def another_self(self, x, y):
        s = x + y
        self = self.inner  # <- self is given another value
        z = self.norm(s)
        return s, z

    @spied
    def decorated(self, x, y):  # <~ it is no method
        s = x + y
        z = self.norm(s)
        return s, z
