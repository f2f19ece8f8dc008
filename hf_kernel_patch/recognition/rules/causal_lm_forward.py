"""The replacement of a causal language model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.rules.head import Loss, why_not_head
from hf_kernel_patch.recognition.rules.lazy import lazy_output, measured_output
from hf_kernel_patch.recognition.rules.logits import Logits, OptimizerSteps
from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import innermost

if TYPE_CHECKING:
    from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics
    from hf_kernel_patch.recognition.rules.causal_lm import Variant


def adapter(variant: Variant, site: Site) -> Callable[..., Any]:
    """The same function, with head and loss in one op where both are the plain ones."""
    original, linear_cross_entropy = site.original, site.op
    scope, loss_of = innermost(original).__globals__, Loss()
    asked = {name: site.options[name] for name in _OPTIONS if site.options.get(name)}
    between, given_out = variant.between, scope[variant.output]
    plain = measured_output(given_out) if asked.get("metrics") else given_out
    lazy, steps = lazy_output(plain), OptimizerSteps()
    site.on_release = steps.stop
    asks_more = bool(_BESIDES & asked.keys())

    def completed(model: Any, given: dict[str, Any], output: Any) -> Any:
        """The original's output, with what was asked of the kernel besides."""
        if not (site.active and asks_more and isinstance(output, (given_out, tuple))):
            return output
        values = dict(output) if isinstance(output, given_out) else None
        if model.training and given.get("labels") is not None:
            loss, logits = output[:2] if values is None else (values["loss"], values["logits"])
            loss, metrics = _besides(asked, given, loss, logits)
            if values is None:
                return (loss, *output[1:])
            values |= {"loss": loss, **(metrics._asdict() if metrics else {})}
        return output if values is None else plain(**values)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(variant.parameters, args)), **kwargs}
        why = _why_not(self, given)
        if len(given) != len(args) + len(kwargs):
            why = "too many arguments, or one twice"  # as the original will say
        why = why or why_not_head(self.lm_head, self.config.vocab_size) or loss_of.why_not(self)
        if not site.active or (why is not None and site.declines(unless=why)):
            return completed(self, given, original(self, *args, **kwargs))
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
            if asks_more:
                loss, metrics = _besides(asked, given, loss, logits)
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
            kind, logits = lazy, Logits(self, between, hidden, steps).stand_in()
        return kind(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **auxiliary,
            **{} if metrics is None else metrics._asdict(),
        )

    return forward


_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index")
#: The kernel's options that its function takes.
_OPTIONS = ("exact", "memory_mib", "metrics", "z_loss")
#: Those that the original of transformers knows nothing of.
_BESIDES = {"metrics", "z_loss"}


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


def _besides(
    asked: dict[str, Any], given: dict[str, Any], loss: Any, logits: Any
) -> tuple[Any, Metrics | None]:
    """The loss with z-loss, and the metrics, as far as they were asked for, from the logits."""
    from hf_kernel_patch.ops.linear_cross_entropy import reference

    ignored = given.get("ignore_index", -100)
    targets = reference.shifted(given["labels"], given.get("shift_labels"), ignored)
    arguments = logits.flatten(0, -2).float(), targets.to(logits.device), ignored
    if z_loss := asked.get("z_loss"):
        divisor = reference.items(arguments[1], given.get("num_items_in_batch"), ignored)
        loss = loss + z_loss * reference.squared_logs(*arguments) / divisor
    return loss, reference.measured(*arguments) if asked.get("metrics") else None


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
