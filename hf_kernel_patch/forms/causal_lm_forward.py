"""The replacement of a causal language model's forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.errors import KernelPatchWarning
from hf_kernel_patch.forms.fingerprint import innermost
from hf_kernel_patch.forms.head import Loss, head_logits, why_not_head
from hf_kernel_patch.forms.lazy import Pending, deferred_tensor, lazy_output
from hf_kernel_patch.forms.site import Site

if TYPE_CHECKING:
    from hf_kernel_patch.forms.causal_lm import Between, Variant


def adapter(variant: Variant, site: Site) -> Callable[..., Any]:
    """The same function, with head and loss in one op where both are the plain ones."""
    original, linear_cross_entropy = site.original, site.op
    scope, loss_of = innermost(original).__globals__, Loss()
    between, plain = variant.between, scope[variant.output]
    lazy = lazy_output(plain)
    asked = {name: site.options[name] for name in _OPTIONS if site.options.get(name)}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(variant.parameters, args)), **kwargs}
        why = _why_not(self, given)
        if len(given) != len(args) + len(kwargs):
            why = "too many arguments, or one twice"  # as the original will say
        why = why or why_not_head(self.lm_head, self.config.vocab_size) or loss_of.why_not(self)
        if not site.active or (why is not None and site.declines(unless=why)):
            return original(self, *args, **kwargs)
        rest = {name: given[name] for name in given if name not in variant.parameters}
        rest.pop("return_dict", None)
        outputs = self.model(**_inputs(self, variant, given), **rest if variant.pass_kwargs else {})
        hidden = variant.kept(scope, outputs.last_hidden_state, given.get("logits_to_keep", 0))
        labels, shifted = given["labels"], rest.get("shift_labels")
        head, metrics = self.lm_head, None
        labels = labels.to(hidden.device)
        shifted = shifted if shifted is None else shifted.to(hidden.device)
        scored = labels if shifted is None else shifted
        biases = () if head.bias is None else (head.bias,)
        why = None if hidden.shape[:-1].numel() == scored.numel() else "labels of another length"
        if site.declines(hidden, head.weight, scored, *biases, unless=why):
            logits = between.apply(self, head(hidden))
            if variant.by_name:
                named = {"logits": logits, "labels": given["labels"]}
                loss = self.loss_function(**named, vocab_size=self.config.vocab_size, **rest)
            else:
                loss = self.loss_function(logits, given["labels"], self.vocab_size, **rest)
        else:
            loss = linear_cross_entropy(
                hidden,
                head.weight,
                labels,
                **{} if head.bias is None else {"bias": head.bias},
                scale=between.scale(self),
                softcap=between.softcap(self),
                **{name: rest[name] for name in _LOSS_OPTIONS if name in rest},
                **{} if shifted is None else {"shift_labels": shifted},
                **asked,
            )
            if asked.get("metrics"):
                loss, metrics = loss
            logits = None
        auxiliary = _auxiliary(self, variant, scope, given, outputs)
        if auxiliary.get("aux_loss") is not None:
            loss = loss + self.router_aux_loss_coef * auxiliary["aux_loss"].to(loss.device)
        kind = plain
        if logits is None and site.options.get("return_logits"):
            logits = between.apply(self, head(hidden))
        elif logits is None:
            kind, logits = lazy, _Logits(self, between, hidden).stand_in()
        made = kind(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **auxiliary,
        )
        if metrics is not None:
            vars(made).update(metrics._asdict())
        return made

    return forward


_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index")
#: The kernel's options that its function takes.
_OPTIONS = ("exact", "memory_mib", "metrics", "z_loss")


def _why_not(model: Any, given: dict[str, Any]) -> str | None:
    """Why this call wants its logits, or no loss."""
    if given.get("labels") is None:
        return "no labels: there is no loss"
    if not model.training:
        return "evaluation: the logits are wanted"
    return_dict = given.get("return_dict")
    if not (model.config.return_dict if return_dict is None else return_dict):
        return "a tuple was asked for"
    return None


def _inputs(model: Any, variant: Variant, given: dict[str, Any]) -> dict[str, Any]:
    """The named arguments of the model below the head."""
    inputs = {name: given.get(name) for name in variant.passed}
    for name in variant.named:
        if inputs[name] is None:
            inputs[name] = getattr(model.config, name)
    return inputs


def _auxiliary(
    model: Any, variant: Variant, scope: dict[str, Any], given: dict[str, Any], outputs: Any
) -> dict[str, Any]:
    """The router's part of the output."""
    if not variant.router:
        return {"router_logits": outputs.router_logits} if variant.routed else {}
    flag, found = given.get("output_router_logits"), None
    if model.config.output_router_logits if flag is None else flag:
        found = scope["load_balancing_loss_func"](
            outputs.router_logits,
            model.num_experts,
            model.num_experts_per_tok,
            given.get("attention_mask"),
        )
    return {"aux_loss": found, "router_logits": outputs.router_logits}


class _Logits(Pending):
    """The logits that the head gives, as they would have been computed in the forward."""

    def __init__(self, model: Any, between: Between, hidden: Any):
        import torch

        super().__init__()
        kind = hidden.device.type
        self.model, self.between, self.hidden = model, between, hidden
        self.casts = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if self.casts else hidden.dtype
        self.weight = model.lm_head.weight
        self.version = self.weight._version

    def make(self) -> Any:
        import torch

        head = self.model.lm_head
        # FSDP2 has two objects for one weight, and none of them tells of the other's steps.
        if head.weight is self.weight and self.weight._version != self.version:
            warnings.warn(
                "logits of a training step are read after its weights have changed: they are of "
                "the new ones; ask for them with the option return_logits",
                KernelPatchWarning,
                stacklevel=5,
            )
        with torch.autocast(self.hidden.device.type, self.dtype, enabled=self.casts):
            return self.between.apply(self.model, head_logits(head, self.hidden))

    def stand_in(self) -> Any:
        """A tensor in place of them; while torch.compile is tracing, this object."""
        import torch

        if torch.compiler.is_compiling():
            return self
        shape = (*self.hidden.shape[:-1], self.model.lm_head.weight.shape[0])
        return deferred_tensor()(self, shape, self.dtype, self.hidden.device)
