"""The causal language model's forward: head and loss in one op, without the full logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from hf_kernel_patch.forms.activation import touched
from hf_kernel_patch.forms.form import Adapter, Form, register_form
from hf_kernel_patch.forms.site import Site

# transformers 4 passes cache_position and, in some families, the output flags through.
_BASE = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
_FLAGS = ("output_attentions", "output_hidden_states")
_ROUTER = ("output_router_logits",)
_OLD_SLICE = (
    "slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int)"
    " else logits_to_keep\n    logits = self.lm_head(hidden_states[:, slice_indices, :])"
)
_NEW_SLICE = (
    "hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)\n"
    "    logits = self.lm_head(hidden_states)"
)
_BY_NAME = "logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs"
_BY_POSITION = "logits, labels, self.vocab_size, **kwargs"
_SCALE = "    logits = logits / self.config.logits_scaling\n"
_SOFTCAP = """\
    if self.config.final_logit_softcapping is not None:
        logits = logits / self.config.final_logit_softcapping
        logits = torch.tanh(logits)
        logits = logits * self.config.final_logit_softcapping
"""
_AUXILIARY = """\
    aux_loss = None
    if output_router_logits:
        aux_loss = load_balancing_loss_func(
            outputs.router_logits, self.num_experts, self.num_experts_per_tok, attention_mask
        )
        if labels is not None:
            loss += self.router_aux_loss_coef * aux_loss.to(loss.device)
"""


def _source(
    slicing: str,
    cache_position: bool,
    flags: bool,
    between: str = "",
    call: str = _BY_NAME,
    router: bool = False,
    pass_kwargs: bool = True,
) -> str:
    """One variant of ``XForCausalLM.forward``."""
    late = ("cache_position",) if cache_position else ()
    middle = (_FLAGS if flags else ()) + (_ROUTER if router else ())
    names = (*_BASE, "labels", "use_cache", *middle, *late)
    parameters = ", ".join(f"{name}=None" for name in names)
    passed = ", ".join(f"{name}={name}" for name in (*_BASE, "use_cache", *middle, *late))
    defaults = "".join(
        f"    {name} = {name} if {name} is not None else self.config.{name}\n"
        for name in _default_order(middle)
    )
    kwargs = ", **kwargs" if pass_kwargs else ""
    output = "MoeCausalLMOutputWithPast" if router else "CausalLMOutputWithPast"
    extra = "aux_loss=aux_loss, " if router else ""
    tail = ", router_logits=outputs.router_logits" if router else ""
    return (
        f"def forward(self, {parameters}, logits_to_keep=0, **kwargs):\n{defaults}"
        f"    outputs = self.model({passed}{kwargs})\n"
        "    hidden_states = outputs.last_hidden_state\n"
        f"    {slicing}\n{between}"
        "    loss = None\n"
        "    if labels is not None:\n"
        f"        loss = self.loss_function({call})\n"
        f"{_AUXILIARY if router else ''}"
        f"    return {output}(loss=loss, {extra}logits=logits,"
        " past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,"
        f" attentions=outputs.attentions{tail})\n"
    )


def _default_order(names: tuple[str, ...]) -> tuple[str, ...]:
    # Qwen2-MoE reads the router's flag between the other two.
    return (names[0], names[2], names[1]) if len(names) == 3 else names


def _adapter(site: Site) -> Callable[..., Any]:
    """Runs the original without labels and with no row of logits, then head and loss at once."""
    original, linear_cross_entropy = site.original, site.op

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None or not self.training:
            return original(self, *args, **kwargs)
        head = self.lm_head
        why_not = _why_not(self, head, args, kwargs)
        if site.declines(getattr(head, "weight", None), labels, unless=why_not):
            return original(self, *args, **kwargs)
        import torch

        loss_names = ("num_items_in_batch", "ignore_index", "shift_labels")
        options = {name: kwargs[name] for name in loss_names if name in kwargs}
        rest = {k: v for k, v in kwargs.items() if k != "labels" and k not in loss_names}
        states = []
        handle = self.model.register_forward_hook(
            lambda module, inputs, output: states.append(output.last_hidden_state)
        )
        try:
            none = torch.empty(0, dtype=torch.long, device=labels.device)
            outputs = original(self, *args, **rest, logits_to_keep=none)
        finally:
            handle.remove()
        loss = linear_cross_entropy(
            states[0],
            head.weight,
            labels,
            scale=1.0 / getattr(self.config, "logits_scaling", 1.0),
            softcap=getattr(self.config, "final_logit_softcapping", None),
            **options,
        )
        auxiliary = getattr(outputs, "aux_loss", None)
        if auxiliary is not None:
            loss = loss + self.router_aux_loss_coef * auxiliary.to(loss.device)
        return type(outputs)(**{**outputs, "loss": loss, "logits": None})

    return forward


def _why_not(model: Any, head: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    from torch import nn
    from transformers.loss.loss_utils import ForCausalLMLoss

    if type(head) is not nn.Linear or head.bias is not None:
        return f"the head is a {type(head).__name__} or has a bias"
    if touched(head):
        return "a hook on the head needs the original"
    if model.loss_function is not ForCausalLMLoss:
        return "the model has another loss function"
    if "logits_to_keep" in kwargs or len(args) > len(_BASE):
        return "logits_to_keep was asked for, or arguments were passed by position"
    return_dict = kwargs.get("return_dict")
    if not (model.config.return_dict if return_dict is None else return_dict):
        return "a tuple was asked for"
    return None


_VERSIONS: tuple[dict[str, Any], ...] = tuple(
    {"slicing": slicing, "cache_position": cache_position}
    for slicing, cache_position in ((_OLD_SLICE, True), (_OLD_SLICE, False), (_NEW_SLICE, False))
)


def _form(name: str, **options: Any) -> None:
    variants: dict[str, Adapter] = {
        _source(**version, flags=flags, **{"pass_kwargs": passed, **options}): _adapter
        for version, flags, passed in product(_VERSIONS, (False, True), (False, True))
    }
    register_form(Form(name, "linear_cross_entropy", variants))


_form("causal_lm.dense")
_form("causal_lm.scaled", between=_SCALE)
_form("causal_lm.softcap", between=_SOFTCAP, call=_BY_POSITION)
_form("causal_lm.moe", router=True, call=_BY_POSITION)
