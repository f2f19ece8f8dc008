"""What the rewritten forward of a language model calls around its head and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.modules import compiling
from hf_kernel_patch.recognition.outcome import fallback
from hf_kernel_patch.recognition.rules.head_loss.arguments import Argument, given_to_loss
from hf_kernel_patch.recognition.rules.head_loss.head import Loss, why_not_head
from hf_kernel_patch.recognition.rules.head_loss.known_modules import plain_head, plain_steps
from hf_kernel_patch.recognition.rules.head_loss.lazy import lazy_output, measured_output
from hf_kernel_patch.recognition.rules.head_loss.logits import Logits, OptimizerSteps
from hf_kernel_patch.recognition.rules.head_loss.steps import Step, scale_and_cap
from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import innermost

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers.utils import ModelOutput

    from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics

_LossFunction = Callable[..., "torch.Tensor"]
_Output = type["ModelOutput"]
_Arguments = tuple[Argument, ...]
_Named = dict[str, Argument]
#: Arguments of the loss that the op takes as they are.
_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index")
#: The kernel's options that its function takes.
_OPTIONS = ("exact", "memory_mib", "metrics", "z_loss")
#: Those that the original does not have, and that are computed here on a fallback.
_ADDED = {"metrics", "z_loss"}


def serve(site: Site) -> Any:
    """The object whose methods a rewritten forward calls."""
    return _Serving(site)


class _Serving:
    """Head, loss and output of one site."""

    def __init__(self, site: Site):
        self.site, self.optimizer_steps, self.known_loss = site, OptimizerSteps(), Loss()
        self.asked = {name: site.options[name] for name in _OPTIONS if site.options.get(name)}
        self.adds_to_loss = bool(_ADDED & self.asked.keys())
        site.on_release = self.optimizer_steps.stop
        # Made before torch.compile traces, which cannot make classes.
        self.outputs = [(cls, *self._subclasses(cls)) for cls in _outputs(site.original)]

    def head(
        self, model: nn.Module, head: nn.Module, hidden: torch.Tensor, labels: Argument
    ) -> torch.Tensor | Logits:
        """The logits, or ``Logits`` that wait, for a call with labels while the model trains."""
        if not self.site.in_force(model):
            return head(hidden)
        reason = _why_fallback(model, labels)
        if reason is not None:
            self.site.count(fallback(reason), model)
            return head(hidden)
        return Logits(plain_head(head), hidden, self.optimizer_steps)

    def waits(self, logits: torch.Tensor | Logits) -> bool:
        """Whether the logits are not computed yet, so that steps between are only noted."""
        return isinstance(logits, Logits)

    def step(self, logits: Logits, *steps: Step) -> Logits:
        """Logits that wait, after these steps."""
        return logits.then(tuple(plain for step in steps for plain in plain_steps(step)))

    def now(self, logits: torch.Tensor | Logits) -> torch.Tensor:
        """The logits themselves, for code that uses them."""
        return logits.of_the_head() if isinstance(logits, Logits) else logits

    def loss(self, model: nn.Module, function: _LossFunction) -> _Call:
        """What the model calls as its loss function: the op, or on a fallback the function."""
        return _Call(self._loss, model, function)

    def _loss(
        self, model: nn.Module, function: _LossFunction, args: _Arguments, kwargs: _Named
    ) -> torch.Tensor:
        logits = args[0] if args else kwargs["logits"]
        if not isinstance(logits, Logits):
            return function(*args, **kwargs)
        head, hidden = logits.head, logits.hidden
        given, reason = given_to_loss(args, kwargs, self.known_loss.is_aligned(function))
        steps = scale_and_cap(logits.steps) if logits.computed is None else None
        reason = (
            why_not_head(head, logits.tokens_of_head(given.get("vocab_size")))
            or (None if steps else "logits changed in a way that the op does not know")
            or self.known_loss.why_not(function)
            or reason
        )
        arguments: tuple[torch.Tensor, ...] = ()
        if reason is None:
            shifted = given.get("shift_labels")
            scored = (given["labels"] if shifted is None else shifted).to(hidden.device)
            if hidden.shape[:-1].numel() != scored.numel():
                reason = "labels of another length"
            weight, bias = logits.weight_and_bias(head.weight, head.bias)
            arguments = hidden, weight, scored, *(() if bias is None else (bias,))
        if self.site.falls_back(*arguments, unless=reason, module=model):
            return self._fall_back(logits, function, given, args, kwargs)
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

    def _fall_back(
        self,
        logits: Logits,
        function: _LossFunction,
        given: _Named,
        args: _Arguments,
        kwargs: _Named,
    ) -> torch.Tensor:
        """The original's loss, of logits that are computed now."""
        computed = logits.of_the_head()
        if args:
            args = computed, *args[1:]
        else:
            kwargs = {**kwargs, "logits": computed}
        loss = function(*args, **kwargs)
        if self.adds_to_loss:
            loss, logits.metrics = _added(self.asked, given, loss, computed)
        return loss

    def output(self, model: nn.Module, cls: _Output) -> _Call:
        """What the model calls as the class of its output; the logits may wait in what it makes."""
        return _Call(self._output, model, cls)

    def _output(
        self, model: nn.Module, cls: _Output, args: _Arguments, fields: _Named
    ) -> ModelOutput:
        logits = fields["logits"]
        if not self.site.in_force(model):
            if isinstance(logits, Logits):
                fields["logits"] = logits.of_the_head()
            return cls(**fields)
        plain, lazy, traced = self._classes_for(cls)
        if not isinstance(logits, Logits):
            return plain(**fields)
        if logits.metrics is not None:
            fields.update(logits.metrics._asdict())
        if self.site.options.get("return_logits") or logits.computed is not None:
            fields["logits"] = logits.of_the_head()
            return plain(**fields)
        fields["logits"] = True  # not the stand-in: an output reads its fields as it is made
        made = (traced if compiling() else lazy)(**fields)
        made.logits = logits.stand_in()
        return made

    def _classes_for(self, cls: _Output) -> tuple[_Output, _Output, _Output]:
        """As ``_subclasses``, which were made before for the outputs that the forward names."""
        for known, *made in self.outputs:
            if known is cls:
                return made[0], made[1], made[2]
        return self._subclasses(cls)

    def _subclasses(self, cls: _Output) -> tuple[_Output, _Output, _Output]:
        """The class for an output with its logits, the one whose logits wait, and that to trace."""
        # mypy takes a class whose type it does not know for one that cannot be hashed.
        plain = measured_output(cls) if self.asked.get("metrics") else cls  # type: ignore[arg-type]
        lazy, traced = lazy_output(plain), lazy_output(plain, traced=True)  # type: ignore[arg-type]
        return plain, lazy, traced


def _outputs(forward: Callable[..., object]) -> list[_Output]:
    """The classes of outputs with logits that a forward names."""
    function = innermost(forward)
    scope = function.__globals__
    named = [scope[name] for name in function.__code__.co_names if name in scope]
    return [value for value in named if "logits" in getattr(value, "__dataclass_fields__", ())]


class _Call:
    """What a model calls in place of a function or a class: ``run``, under the original's name.

    Errors that Python raises about the call name the original then.
    """

    def __init__(
        self, run: Callable[..., object], model: nn.Module, function: Callable[..., object]
    ):
        self._run, self._model, self._function = run, model, function
        if not compiling() and (name := getattr(function, "__qualname__", None)) is not None:
            self.__qualname__, self.__module__ = name, function.__module__

    def __call__(self, /, *args: Argument, **kwargs: Argument) -> object:
        return self._run(self._model, self._function, args, kwargs)

    def __str__(self) -> str:
        return str(self._function)


def _why_fallback(model: nn.Module, labels: Argument) -> str | None:
    """Why this call needs its logits or has no loss, or None."""
    if labels is None:
        return "no labels: there is no loss"
    if not model.training:
        return "evaluation: the logits are wanted"
    return None


def _added(
    asked: dict[str, object], given: _Named, loss: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, Metrics | None]:
    """The loss with z-loss, and the metrics, as far as they were asked for, from the logits."""
    from hf_kernel_patch.ops.linear_cross_entropy import reference

    ignored = given.get("ignore_index", -100)
    targets = reference.shifted(given["labels"], given.get("shift_labels"), ignored)
    arguments = logits.flatten(0, -2).float(), targets.to(logits.device), ignored
    if z_loss := asked.get("z_loss"):
        divisor = reference.items(arguments[1], given.get("num_items_in_batch"), ignored)
        loss = loss + z_loss * reference.squared_logs(*arguments) / divisor
    return loss, reference.measured(*arguments) if asked.get("metrics") else None
