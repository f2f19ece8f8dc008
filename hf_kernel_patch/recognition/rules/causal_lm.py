"""The causal language model's forward: head and loss in one op, without the full logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from hf_kernel_patch.recognition.form import Form, register_form
from hf_kernel_patch.recognition.rules.causal_lm_forward import adapter

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
_AUXILIARY = """\
    aux_loss = None
    if output_router_logits:
        aux_loss = load_balancing_loss_func(
            outputs.router_logits, self.num_experts, self.num_experts_per_tok, attention_mask
        )
        if labels is not None:
            loss += self.router_aux_loss_coef * aux_loss.to(loss.device)
"""


class Between(NamedTuple):
    """What is done to the logits between head and loss."""

    source: str = ""
    #: Of the model: the factor of the logits, and the cap of their size or None.
    scale: Callable[[Any], float] = lambda model: 1.0
    softcap: Callable[[Any], float | None] = lambda model: None
    #: The lines of the source.
    apply: Callable[[Any, Any], Any] = lambda model, logits: logits


def _capped(model: Any, logits: Any) -> Any:
    import torch

    if model.config.final_logit_softcapping is not None:
        logits = logits / model.config.final_logit_softcapping
        logits = torch.tanh(logits)
        logits = logits * model.config.final_logit_softcapping
    return logits


_NOTHING = Between()
_DIVIDED = Between(
    "    logits = logits / self.config.logits_scaling\n",
    scale=lambda model: 1.0 / model.config.logits_scaling,
    apply=lambda model, logits: logits / model.config.logits_scaling,
)
_MULTIPLIED = Between(
    "    logits = logits * self.logit_scale\n",
    scale=lambda model: model.logit_scale,
    apply=lambda model, logits: logits * model.logit_scale,
)
_SOFTCAP = Between(
    """\
    if self.config.final_logit_softcapping is not None:
        logits = logits / self.config.final_logit_softcapping
        logits = torch.tanh(logits)
        logits = logits * self.config.final_logit_softcapping
""",
    softcap=lambda model: model.config.final_logit_softcapping,
    apply=_capped,
)


class Variant(NamedTuple):
    """One way in which ``XForCausalLM.forward`` is written."""

    slicing: str
    cache_position: bool
    flags: bool
    pass_kwargs: bool
    between: Between = _NOTHING
    call: str = _BY_NAME
    router: bool = False
    #: Whether the router's logits are in the output without an auxiliary loss.
    routed: bool = False

    @property
    def by_name(self) -> bool:
        """Whether the loss is called with names, and the configuration's vocabulary."""
        return self.call == _BY_NAME

    def kept(self, scope: dict[str, Any], hidden: Any, keep: Any) -> Any:
        """The hidden states of the positions that are kept; ``scope`` is the function's."""
        if isinstance(keep, int) and keep == 0:
            return hidden
        if self.slicing == _NEW_SLICE:
            return scope["slice_logits_to_keep"](hidden, keep)
        return hidden[:, slice(-keep, None) if isinstance(keep, int) else keep, :]

    @property
    def named(self) -> tuple[str, ...]:
        """The flags that are read from the configuration where they are not given."""
        return (_FLAGS if self.flags else ()) + (_ROUTER if self.router else ())

    @property
    def passed(self) -> tuple[str, ...]:
        """What goes on to the model below the head."""
        late = ("cache_position",) if self.cache_position else ()
        return (*_BASE, "use_cache", *self.named, *late)

    @property
    def parameters(self) -> tuple[str, ...]:
        names = self.passed
        return (*names[: len(_BASE)], "labels", *names[len(_BASE) :], "logits_to_keep")

    @property
    def output(self) -> str:
        """The name of the output's class."""
        has_router = self.router or self.routed
        return "MoeCausalLMOutputWithPast" if has_router else "CausalLMOutputWithPast"

    def source(self) -> str:
        """The function."""
        parameters = ", ".join(f"{name}=None" for name in self.parameters[:-1])
        passed = ", ".join(f"{name}={name}" for name in self.passed)
        defaults = "".join(
            f"    {name} = {name} if {name} is not None else self.config.{name}\n"
            for name in _default_order(self.named)
        )
        kwargs = ", **kwargs" if self.pass_kwargs else ""
        extra = "aux_loss=aux_loss, " if self.router else ""
        has_router = self.router or self.routed
        tail = ", router_logits=outputs.router_logits" if has_router else ""
        return (
            f"def forward(self, {parameters}, logits_to_keep=0, **kwargs):\n{defaults}"
            f"    outputs = self.model({passed}{kwargs})\n"
            "    hidden_states = outputs.last_hidden_state\n"
            f"    {self.slicing}\n{self.between.source}"
            "    loss = None\n"
            "    if labels is not None:\n"
            f"        loss = self.loss_function({self.call})\n"
            f"{_AUXILIARY if self.router else ''}"
            f"    return {self.output}(loss=loss, {extra}logits=logits,"
            " past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,"
            f" attentions=outputs.attentions{tail})\n"
        )


def _default_order(names: tuple[str, ...]) -> tuple[str, ...]:
    # Qwen2-MoE reads the router's flag between the other two.
    return (names[0], names[2], names[1]) if len(names) == 3 else names


_SLICES = ((_OLD_SLICE, True), (_OLD_SLICE, False), (_NEW_SLICE, False))


def _form(name: str, *also: dict[str, Any], **options: Any) -> None:
    """A form in all its spellings; ``also`` are other options that some versions have."""
    variants = [
        Variant(*slicing, flags, passed, **chosen)
        for slicing, flags, passed in product(_SLICES, (False, True), (False, True))
        for chosen in (options, *also)
    ]
    adapters = {variant.source(): partial(adapter, variant) for variant in variants}
    register_form(Form(name, "linear_cross_entropy", adapters))


_form("causal_lm.dense", {"routed": True})
_form("causal_lm.scaled", between=_DIVIDED)
_form("causal_lm.multiplied", between=_MULTIPLIED)
_form("causal_lm.softcap", between=_SOFTCAP, call=_BY_POSITION)
_form("causal_lm.moe", router=True, call=_BY_POSITION)
