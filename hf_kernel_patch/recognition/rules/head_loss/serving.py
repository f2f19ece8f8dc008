"""What the rewritten forward of a language model calls around its head and its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.modules import compiling
from hf_kernel_patch.recognition.outcome import fallback
from hf_kernel_patch.recognition.rules.head_loss.arguments import given_to_loss
from hf_kernel_patch.recognition.rules.head_loss.head import Loss, why_not_head
from hf_kernel_patch.recognition.rules.head_loss.known_modules import plain_head, plain_steps
from hf_kernel_patch.recognition.rules.head_loss.lazy import lazy_output, measured_output
from hf_kernel_patch.recognition.rules.head_loss.logits import (
    Logits,
    OptimizerSteps,
    scale_and_cap,
)
from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import innermost

if TYPE_CHECKING:
    from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics

#: Arguments of the loss that the op takes as they are.
_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index")
#: The kernel's options that its function takes.
_OPTIONS = ("exact", "memory_mib", "metrics", "z_loss")
#: Those that the original of transformers knows nothing of.
_BESIDES = {"metrics", "z_loss"}


def serve(site: Site) -> Any:
    """The object whose methods a rewritten forward calls."""
    return _Serving(site)


class _Serving:
    """Head, loss and output of one site."""

    def __init__(self, site: Site):
        self.site, self.steps, self.known_loss = site, OptimizerSteps(), Loss()
        self.asked = {name: site.options[name] for name in _OPTIONS if site.options.get(name)}
        self.asks_more = bool(_BESIDES & self.asked.keys())
        site.on_release = self.steps.stop
        # Made ahead for torch.compile, which cannot make classes.
        self.outputs = [(kind, *self._made_of(kind)) for kind in _outputs(site.original)]

    def head(self, model: Any, head: Any, hidden: Any, labels: Any) -> Any:
        """The logits, or ``Logits`` that wait, for a call with labels while the model trains."""
        if not self.site.in_force(model):
            return head(hidden)
        why_not = _why_not(model, labels)
        if why_not is not None:
            self.site.count(fallback(why_not), model)
            return head(hidden)
        return Logits(plain_head(head), hidden, self.steps)

    def waits(self, logits: Any) -> bool:
        """Whether the logits wait, so that the steps between head and loss are their affair."""
        return isinstance(logits, Logits)

    def step(self, logits: Logits, *steps: Any) -> Logits:
        """Logits that wait, after these steps."""
        return logits.then(tuple(one for each in steps for one in plain_steps(each)))

    def now(self, logits: Any) -> Any:
        """The logits themselves, for code that uses them."""
        return logits.of_the_head() if isinstance(logits, Logits) else logits

    def loss(self, model: Any, function: Any) -> Any:
        """The model's loss function; its result is the op's where that may serve."""
        return _Call(self._loss, model, function)

    def _loss(self, model: Any, function: Any, args: Any, kwargs: Any) -> Any:
        logits = args[0] if args else kwargs["logits"]
        if not isinstance(logits, Logits):
            return function(*args, **kwargs)
        head, hidden = logits.head, logits.hidden
        given, why_not = given_to_loss(args, kwargs, self.known_loss.is_aligned(function))
        steps = scale_and_cap(logits.between) if logits.computed is None else None
        why_not = (
            why_not_head(head, logits.rows(given.get("vocab_size")))
            or (None if steps else "logits changed in a way that the op does not know")
            or self.known_loss.why_not(function)
            or why_not
        )
        arguments: tuple[Any, ...] = ()
        if why_not is None:
            shifted = given.get("shift_labels")
            scored = (given["labels"] if shifted is None else shifted).to(hidden.device)
            if hidden.shape[:-1].numel() != scored.numel():
                why_not = "labels of another length"
            weight, bias = logits.weight_and_bias(head.weight, head.bias)
            arguments = hidden, weight, scored, *(() if bias is None else (bias,))
        if self.site.declines(*arguments, unless=why_not, module=model):
            return self._by_the_original(logits, function, given, args, kwargs)
        scale, softcap = steps  # type: ignore[misc]
        loss = self.site.op(
            hidden,
            weight,
            scored if shifted is None else None,
            **{} if bias is None else {"bias": bias},
            scale=scale,
            softcap=softcap,
            **{name: given[name] for name in _LOSS_OPTIONS if name in given},
            **{} if shifted is None else {"shift_labels": scored},
            **self.asked,
        )
        if self.asked.get("metrics"):
            loss, logits.metrics = loss
        return loss

    def _by_the_original(
        self, logits: Logits, function: Any, given: dict[str, Any], args: Any, kwargs: Any
    ) -> Any:
        computed = logits.of_the_head()
        if args:
            args = computed, *args[1:]
        else:
            kwargs = {**kwargs, "logits": computed}
        loss = function(*args, **kwargs)
        if self.asks_more:
            loss, logits.metrics = _besides(self.asked, given, loss, computed)
        return loss

    def output(self, model: Any, kind: Any) -> Any:
        """The class of the output, whose logits may be computed when they are first read."""
        return _Call(self._output, model, kind)

    def _output(self, model: Any, kind: Any, args: Any, fields: dict[str, Any]) -> Any:
        logits = fields["logits"]
        if not self.site.in_force(model):
            if isinstance(logits, Logits):
                fields["logits"] = logits.of_the_head()
            return kind(**fields)
        plain, lazy, traced = self._kinds(kind)
        if not isinstance(logits, Logits):
            return plain(**fields)
        if logits.metrics is not None:
            fields.update(logits.metrics._asdict())
        if self.site.options.get("return_logits") or logits.computed is not None:
            fields["logits"] = logits.of_the_head()
            return plain(**fields)
        fields["logits"] = True  # holds their place: an output reads its fields as it is made
        made = (traced if compiling() else lazy)(**fields)
        made.logits = logits.stand_in()
        return made

    def _kinds(self, kind: Any) -> tuple[Any, Any, Any]:
        """The class of an output with its logits, and those whose logits wait."""
        for known, *made in self.outputs:
            if known is kind:
                return made[0], made[1], made[2]
        return self._made_of(kind)

    def _made_of(self, kind: Any) -> tuple[Any, Any, Any]:
        plain = measured_output(kind) if self.asked.get("metrics") else kind
        return plain, lazy_output(plain), lazy_output(plain, traced=True)


def _outputs(forward: Any) -> list[Any]:
    """The classes of outputs with logits that a forward names."""
    function: Any = innermost(forward)
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [one for one in named if "logits" in getattr(one, "__dataclass_fields__", ())]


class _Call:
    """A function or a class as a model calls it here; errors name it as they name the original."""

    def __init__(self, run: Any, model: Any, function: Any):
        self._run, self._model, self._function = run, model, function
        if not compiling() and (name := getattr(function, "__qualname__", None)) is not None:
            self.__qualname__, self.__module__ = name, function.__module__

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._model, self._function, args, kwargs)

    def __str__(self) -> str:
        return str(self._function)


def _why_not(model: Any, labels: Any) -> str | None:
    """Why this call wants its logits, or no loss."""
    if labels is None:
        return "no labels: there is no loss"
    if not model.training:
        return "evaluation: the logits are wanted"
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
