"""Heads and losses between which stands code that needs the logits. See the package."""
# ruff: noqa
# fmt: off

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

kept = None


def finish(loss, logits):
    return loss, logits


class Cases(nn.Module):
    def sliced(self, x, labels):
        logits = self.lm_head(x)
        logits = logits[..., 1:10]  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def temperature_of_a_call(self, x, labels):
        logits = self.lm_head(x)
        logits = logits / self.temperature()  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def clamped(self, x, labels):
        logits = self.lm_head(x)
        logits.clamp_(-5, 5)  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def written(self, x, labels):
        logits = self.lm_head(x)
        logits[:, :, 0] = -100.0  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def printed(self, x, labels):
        logits = self.lm_head(x)
        print(logits.shape)  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def scaled_in_place(self, x, labels):
        logits = self.lm_head(x)
        logits *= 2  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def another_function(self, x, labels):
        logits = self.lm_head(x)
        if self.config.cap is not None:
            logits = logits / self.config.cap
            logits = torch.sigmoid(logits)  # <- between head and loss stands other code
            logits = logits * self.config.cap
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def another_tanh(self, x, labels, torch=kept):
        logits = self.lm_head(x)
        logits = torch.tanh(logits)  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def a_module_of_the_logits(self, x, labels):
        logits = self.lm_head(x)
        logits = self.dropout(logits)  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def upcast_by_a_name(self, x, labels, dtype):
        logits = self.lm_head(x)
        logits = logits.to(dtype)  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def written_on_a_branch(self, x, labels):
        logits = self.lm_head(x)
        if self.config.cap is not None:
            logits[:, :, 0] = 0  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def branch_on_the_logits(self, x, labels):
        logits = self.lm_head(x)
        if logits.max() > 3:  # <- between head and loss stands other code
            logits = logits / 3
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def branch_on_a_call(self, x, labels):
        logits = self.lm_head(x)
        if self.capped():  # <- between head and loss stands other code
            logits = logits / 3
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def another_name_of_the_logits(self, x, labels):
        logits = self.lm_head(x)
        scores = logits  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits, attentions=scores)

    def other_names_by_a_call(self, x, labels):
        logits = self.lm_head(x)
        if (scale := self.scale_now()) is not None:  # <- between head and loss stands other code
            logits = logits * scale
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def popped_from_another_dictionary(self, x, labels, given):
        logits = self.lm_head(x)
        shifted = given.pop("shift_labels", labels)  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10, shift_labels=shifted)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def hidden_changed_between(self, x, labels):
        logits = self.lm_head(x)
        x.zero_()  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def hidden_changed_on_the_way(self, x, labels):
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            x.zero_()  # <- between head and loss stands other code
            loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def hidden_changed_after(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        x.zero_()  # <- a value is changed before the output is made
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def weights_changed_between(self, x, labels):
        logits = self.lm_head(x)
        self.update()  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def head_twice(self, x, labels):
        logits = self.lm_head(x)
        other = self.lm_head(x * 2)  # <- the head is used twice
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=other)

    def head_on_two_paths(self, x, labels):
        if self.training:
            logits = self.lm_head(x)
        else:
            logits = self.lm_head(x[:, -1:])
        loss = self.loss_function(logits, labels, 10)  # <- logits come from 2 heads in statements of their own
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def conditional_head(self, x, labels):
        logits = None
        if self.training:
            logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)  # <- the loss does not follow the head
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def head_of_two(self, x, labels):
        logits = self.lm_head(x, labels)  # <- the head takes more than the hidden states
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def head_in_an_expression(self, x, labels):
        logits = self.lm_head(x) + self.offset
        loss = self.loss_function(logits, labels, 10)  # <- logits come from 0 heads in statements of their own
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def head_of_a_function(self, x, labels):
        logits = finish(x, labels)
        loss = self.loss_function(logits, labels, 10)  # <- logits come from 0 heads in statements of their own
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def head_of_another_model(self, x, labels):
        outputs = self.language_model(x)
        logits = outputs[0]
        loss = self.loss_function(logits, labels, 10)  # <- logits are what another model gives
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def head_of_another_model_by_name(self, x, labels):
        outputs = self.language_model(x)
        logits = outputs.logits
        loss = self.loss_function(logits, labels, 10)  # <- logits are what another model gives
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def head_chosen_by_a_call(self, x, labels):
        logits = self.heads[self.step()](x)
        loss = self.loss_function(logits, labels, 10)  # <- logits come from 0 heads in statements of their own
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def head_in_a_walrus(self, x, labels):
        loss = self.loss_function(logits := self.lm_head(x), labels, 10)  # <- the loss takes something else than the name of the logits
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def logits_used_after_the_loss(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        loss = loss + logits.mean()  # <- logits are used again
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def logits_deleted(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)  # <- logits are not returned in an output by name
        del logits
        return CausalLMOutputWithPast(loss=loss, logits=None)

    def logits_kept(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        self.last = logits  # <- logits are used again
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def two_losses(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        loss = loss + self.loss_function(logits, labels, 10)  # <- the loss is computed twice
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def loss_in_a_loop(self, x, labels):
        logits = self.lm_head(x)
        for _ in range(2):  # <- between head and loss stands other code
            loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def loss_in_a_lambda(self, x, labels):
        logits = self.lm_head(x)
        later = lambda: self.loss_function(logits, labels, 10)  # <- logits is no name of this function alone
        return CausalLMOutputWithPast(loss=later(), logits=logits)

    def loss_in_a_comprehension(self, x, labels):
        logits = self.lm_head(x)
        loss = sum([self.loss_function(logits, labels, 10) for _ in range(2)])  # <- between head and loss stands other code
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def labels_of_a_call(self, x, labels):
        logits = self.lm_head(x)
        labels = self.moved(labels)  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def labels_of_a_call_in_the_loss(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, self.moved(labels), 10)  # <- between head and loss stands other code
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def labels_of_the_logits(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, logits.argmax(-1), 10)  # <- between head and loss stands other code
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def a_call_before_the_loss(self, x, labels):
        logits = self.lm_head(x)
        loss = self.penalty(x) + self.loss_function(logits, labels, 10)  # <- between head and loss stands other code
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def logits_an_expression(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits.float(), labels, 10)  # <- the loss takes something else than the name of the logits
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def all_by_two_stars(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(**{"logits": logits, "labels": labels})  # <- the loss takes something else than the name of the logits
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def a_loss_of_classes(self, x, labels):  # <~ no code that the rule head_loss knows
        logits = self.score(x)
        loss = self.loss_function(logits, labels, self.config)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def a_loss_of_frames(self, x, labels, lengths, **kwargs):  # <~ no code that the rule head_loss knows
        logits = self.lm_head(x)
        loss = self.loss_function(logits=logits, labels=labels, input_lengths=lengths, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def a_loss_of_boxes(self, x, labels):  # <~ no code that the rule head_loss knows
        logits = self.score(x)
        loss = self.loss_function(logits, labels, self.device)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def output_by_place(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)  # <- logits are not returned in an output by name
        return CausalLMOutputWithPast(loss, logits)

    def output_in_a_name_that_is_used(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)  # <- logits are not returned in an output by name
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        self.last = output
        return output

    def two_outputs(self, x, labels):
        logits = self.lm_head(x)
        if labels is not None:
            loss = self.loss_function(logits, labels, 10)
            return CausalLMOutputWithPast(loss=loss, logits=logits)  # <- logits are used again
        return CausalLMOutputWithPast(logits=logits)

    def the_loss_alone(self, x, labels):
        logits = self.lm_head(x)
        if labels is not None:
            loss = self.loss_function(logits, labels, 10)
            return loss  # <- there is another return
        return CausalLMOutputWithPast(logits=logits)

    def a_tuple(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)  # <- logits are not returned in an output by name
        return loss, logits

    def used_on_a_branch_s_condition(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        if logits.isnan().any():  # <- logits are used again
            loss = loss * 0
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def used_on_the_loss_s_branch(self, x, labels):
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, 10)
            loss = loss + logits.square().mean()  # <- logits are used again
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def another_value_on_a_branch(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        if self.training:
            logits = None  # <- logits are used again
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def in_a_text_on_a_branch(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        if self.training:
            self.show(f"{logits}")  # <- logits are used again
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def a_sum_after(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        x += 1  # <- a value is changed before the output is made
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def changed_on_the_loss_s_branch(self, x, labels):
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, 10)
            x.zero_()  # <- a value is changed before the output is made
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def logits_as_an_expression(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)  # <- logits are not returned in an output by name
        return CausalLMOutputWithPast(loss=loss, logits=logits.float())

    def output_of_a_function(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        return finish(loss=loss, logits=logits)  # <- finish is no class of outputs with logits

    def early_return(self, x, labels):
        logits = self.lm_head(x)
        if labels is None:
            return logits  # <- between head and loss stands other code
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def captured_by_a_closure(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        self.show(lambda: logits.shape)  # <- logits is no name of this function alone
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def captured_by_a_generator(self, x, labels):
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, 10)
        rows = (logits[i] for i in range(2))  # <- logits is no name of this function alone
        return CausalLMOutputWithPast(loss=loss, logits=logits, attentions=rows)

    def a_global_name(self, x, labels):
        global kept  # <- kept is no name of this function alone
        kept = self.lm_head(x)
        loss = self.loss_function(kept, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=kept)

    def names_read(self, x, labels):
        logits = self.lm_head(x)
        found = locals()  # <- locals() sees its local names
        loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits, attentions=found)

    def under_with(self, x, labels):
        logits = self.lm_head(x)
        with torch.autocast("cpu"):  # <- between head and loss stands other code
            loss = self.loss_function(logits, labels, 10)
        return CausalLMOutputWithPast(loss=loss, logits=logits)
