"""The logits of a causal language model that are computed when they are first read."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.errors import KernelPatchWarning
from hf_kernel_patch.recognition.rules.head_loss.head import why_not_head
from hf_kernel_patch.recognition.rules.head_loss.stand_in import Pending, deferred_tensor

if TYPE_CHECKING:
    from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics

#: What is done to the logits between head and loss, in this order, as ``step`` does each.
Between = tuple[tuple[Any, ...], ...]


def step(logits: Any, kind: str, by: Any = None) -> Any:
    """Logits divided or multiplied ("/", "*"), capped, upcast, or as a module gives them.

    "first" are those of the first tokens of the vocabulary.
    """
    import torch

    match kind:
        case "/":
            return logits / by
        case "*":
            return logits * by
        case "tanh":
            return torch.tanh(logits)
        case "float":
            return logits.float()
        case "contiguous":
            return logits.contiguous()
        case "first":
            return logits[..., :by]
    return by(logits)


def between_applied(between: Between, logits: Any) -> Any:
    """The logits after these steps."""
    for one in between:
        logits = step(logits, *one)
    return logits


def is_known(kind: str, by: Any = None) -> bool:
    """Whether the op may know such a step."""
    match kind:
        case "/" | "*":
            return type(by) in (int, float) and bool(by)
        case "first":
            return type(by) is int and by > 0
    return kind != "module"


def scale_and_cap(between: Between) -> tuple[float, float | None] | None:
    """The factor of the logits and the cap of their size, as the op takes them.

    ("/", c), ("tanh",), ("*", c) are a cap, after which no other factor may come; None for steps
    that the op does not have.
    """
    steps = [one for one in between if one[0] not in ("float", "contiguous", "first")]
    cap = None
    if ("tanh",) in steps:
        if len(steps) < 3 or steps[-2] != ("tanh",) or steps[-3][0] != "/":
            return None
        if steps[-1] != ("*", cap := steps[-3][1]):
            return None
        del steps[-3:]
    scale = 1.0
    for kind, *by in steps:
        if not by:  # capped twice
            return None
        scale = scale / by[0] if kind == "/" else scale * by[0]
    return scale, cap if cap is None else float(cap)


class OptimizerSteps:
    """How many steps optimizers took: a fused one leaves no trace on the weights it changes."""

    def __init__(self) -> None:
        self.count = 0
        self._hook: Any = None

    def watch(self) -> None:
        """Begin to count."""
        if self._hook is None:
            from torch.optim.optimizer import register_optimizer_step_post_hook

            self._hook = register_optimizer_step_post_hook(self._stepped)

    def stop(self) -> None:
        """Leave the optimizers alone."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _stepped(self, *_: Any) -> None:
        self.count += 1


class Logits(Pending):
    """The logits that the head gives, as they would have been computed in the forward."""

    metrics: Metrics | None = None

    def __init__(self, head: Any, hidden: Any, steps: OptimizerSteps):
        import torch

        super().__init__()
        kind = hidden.device.type
        self.head, self.hidden, self._steps = head, hidden, steps
        self.between: Between = ()
        #: Of how many tokens of the vocabulary they are, the first ones; None for all.
        self.tokens: int | None = None
        #: The logits, where they were needed in the forward.
        self.computed: Any = None
        self.casts = torch.is_autocast_enabled(kind)
        self._cast = torch.get_autocast_dtype(kind)
        self._dtype = self._cast if self.casts else hidden.dtype
        self._records, self._infers = torch.is_grad_enabled(), False
        self._stamp: tuple[Any, ...] = ()
        if not torch.compiler.is_compiling():  # which can't ask, or would compile anew for each
            self._infers = torch.is_inference_mode_enabled()

    def then(self, steps: Between) -> Logits:
        """These logits after some more steps; computed, where the op cannot know one of them."""
        import torch

        if self.computed is not None or not all(is_known(*one) for one in steps):
            self.computed = between_applied(steps, self.of_the_head())
        for kind, *by in steps:
            if kind == "float":
                self._dtype = torch.float32
            elif kind == "first" and self.computed is None:
                self.tokens = by[0] if self.tokens is None else min(by[0], self.tokens)
        self.between = (*self.between, *steps)
        return self

    # What a model may ask of its logits before the loss. If the head is no plain one, only the
    # logits themselves tell.
    @property
    def shape(self) -> Any:
        import torch

        self._tell()
        if self.computed is not None:
            return self.computed.shape
        weight = self.weight_and_bias(self.head.weight, None)[0]
        return torch.Size((*self.hidden.shape[:-1], weight.shape[0]))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> Any:
        self._tell()
        return self.hidden.device if self.computed is None else self.computed.device

    @property
    def dtype(self) -> Any:
        return self._dtype if self.computed is None else self.computed.dtype

    def _tell(self) -> None:
        if why_not_head(self.head, getattr(self.head, "out_features", None)) is not None:
            self.of_the_head()

    def rows(self, vocabulary: Any) -> Any:
        """How many the head's weight has to have, for logits of a vocabulary."""
        every = getattr(self.head, "out_features", 0)
        fewer = self.tokens is not None and vocabulary == self.tokens < every
        return every if fewer or self.computed is not None else vocabulary

    def weight_and_bias(self, weight: Any, bias: Any) -> tuple[Any, Any]:
        """The head's, of those tokens of the vocabulary that have logits."""
        if self.tokens is None:
            return weight, bias
        return weight[: self.tokens], bias if bias is None else bias[: self.tokens]

    def of_the_head(self) -> Any:
        """The logits, computed now as the original does: by the head, and the steps after it."""
        if self.computed is None:
            self.computed = between_applied(self.between, self.head(self.hidden))
        return self.computed

    def make(self) -> Any:
        import torch

        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling():
            return self._of(weight, bias)
        if self._stamp and (changed := self._changed()):
            warnings.warn(
                f"logits of a training step are read after its {changed} have changed: they are of "
                "the new ones; ask for them with the option return_logits",
                KernelPatchWarning,
                stacklevel=7,
            )
        if not _has_memory(weight):
            weight, bias = gathered(self.head.weight), gathered(self.head.bias)
        with torch.inference_mode(self._infers), torch.set_grad_enabled(self._records):
            return self._of(weight, bias)

    def _changed(self) -> str:
        """What is not as it was, "weights" or "hidden states", as far as can be told; or ""."""
        count, hidden, *seen = self._stamp
        if hidden != _version(self.hidden):
            return "hidden states"
        other = _has_memory(self.weight) and list(_stamp_of(self.weight)) != seen
        return "weights" if other or count != self._steps.count else ""

    def _of(self, weight: Any, bias: Any) -> Any:
        import torch
        from torch.nn import functional

        kind = self.hidden.dtype
        with torch.autocast(self.hidden.device.type, self._cast, enabled=self.casts):
            bias = None if bias is None else bias.to(kind)
            logits = functional.linear(self.hidden, weight.to(kind), bias)
            return between_applied(self.between, logits)

    def stand_in(self) -> Any:
        """A tensor in place of them; while torch.compile is tracing, this object."""
        import torch

        self.weight, self.bias = self.head.weight, self.head.bias
        if not torch.compiler.is_compiling():
            self._steps.watch()
            self._stamp = self._steps.count, _version(self.hidden), *_stamp_of(self.weight)
            of = (self.hidden, self.weight, self.bias)
            self.requires_grad = self._records and any(
                one.requires_grad for one in of if one is not None
            )
        if torch.compiler.is_compiling():
            return self
        return deferred_tensor()(self, self.shape, self.dtype, self.hidden.device)


def _version(tensor: Any) -> int:
    """How often it was written into; tensors of the inference mode do not count."""
    return 0 if tensor.is_inference() else int(tensor._version)


def _stamp_of(weight: Any) -> tuple[Any, ...]:
    """What differs where a weight has changed, but for a fused optimizer's step."""
    return _version(weight), weight.data_ptr(), weight.dtype


def _has_memory(weight: Any) -> bool:
    """Whether it is still there: FSDP2 takes the memory back of a weight that it has gathered."""
    return bool(weight.untyped_storage().size())


def gathered(parameter: Any) -> Any:
    """A parameter that FSDP2 has sharded in one piece, as every rank has to ask for at once.

    Its gradient is the mean over the ranks, as that of the weight which FSDP2 gathers.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda grad: grad / mesh.size())
    return full
