"""The logits of a causal language model that are computed when they are first read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_kernel_patch.errors import warn
from hf_kernel_patch.recognition.rules.head_loss.head import why_not_head
from hf_kernel_patch.recognition.rules.head_loss.stand_in import Pending, deferred_tensor
from hf_kernel_patch.recognition.rules.head_loss.steps import Steps, apply_all, is_known

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics


class OptimizerSteps:
    """How many steps optimizers took.

    A fused optimizer changes weights without changing their version counter.
    """

    def __init__(self) -> None:
        self.count = 0
        self._hook: RemovableHandle | None = None

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

    def _stepped(self, *_: object) -> None:
        self.count += 1


class Logits(Pending):
    """The logits that the head gives, as they would have been computed in the forward."""

    metrics: Metrics | None = None

    def __init__(self, head: nn.Module, hidden: torch.Tensor, optimizer_steps: OptimizerSteps):
        import torch

        super().__init__()
        device = hidden.device.type
        self.head, self.hidden, self._optimizer_steps = head, hidden, optimizer_steps
        #: What is done to them between head and loss.
        self.steps: Steps = ()
        #: How many tokens of the vocabulary they are for, counted from the first; None for all.
        self.tokens: int | None = None
        #: The logits, where they were needed in the forward.
        self.computed: torch.Tensor | None = None
        self.casts = torch.is_autocast_enabled(device)
        self._cast = torch.get_autocast_dtype(device)
        self._dtype = self._cast if self.casts else hidden.dtype
        self._grad_enabled, self._inference_mode = torch.is_grad_enabled(), False
        #: What tells whether weights or hidden states have changed since the forward.
        self._stamp: tuple[object, ...] = ()
        if not torch.compiler.is_compiling():  # torch.compile cannot trace the question
            self._inference_mode = torch.is_inference_mode_enabled()

    def then(self, steps: Steps) -> Logits:
        """These logits after more steps; computed now where the op does not know all of them."""
        import torch

        if self.computed is not None or not all(is_known(*step) for step in steps):
            self.computed = apply_all(steps, self.of_the_head())
        for name, *by in steps:
            if name == "float":
                self._dtype = torch.float32
            elif name == "first" and self.computed is None:
                self.tokens = by[0] if self.tokens is None else min(by[0], self.tokens)
        self.steps = (*self.steps, *steps)
        return self

    # What a model may ask of its logits before the loss.
    @property
    def shape(self) -> torch.Size:
        import torch

        self._compute_unless_plain()
        if self.computed is not None:
            return self.computed.shape
        weight = self.weight_and_bias(self.head.weight, None)[0]
        return torch.Size((*self.hidden.shape[:-1], weight.shape[0]))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        self._compute_unless_plain()
        return self.hidden.device if self.computed is None else self.computed.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype if self.computed is None else self.computed.dtype

    def _compute_unless_plain(self) -> None:
        """Compute them if the head is no plain linear layer, whose shapes would say enough."""
        if why_not_head(self.head, getattr(self.head, "out_features", None)) is not None:
            self.of_the_head()

    def tokens_of_head(self, vocabulary: int | None) -> int | None:
        """How many tokens the head's weight has to be for, for a loss over this vocabulary."""
        every = getattr(self.head, "out_features", 0)
        fewer = self.tokens is not None and vocabulary == self.tokens < every
        return every if fewer or self.computed is not None else vocabulary

    def weight_and_bias(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The head's weight and bias, cut to the tokens that have logits."""
        if self.tokens is None:
            return weight, bias
        return weight[: self.tokens], bias if bias is None else bias[: self.tokens]

    def of_the_head(self) -> torch.Tensor:
        """The logits, computed now as the original does: by the head, and the steps after it."""
        if self.computed is None:
            self.computed = apply_all(self.steps, self.head(self.hidden))
        return self.computed

    def make(self) -> torch.Tensor:
        import torch

        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling():
            return self._of(weight, bias)
        if self._stamp and (changed := self._changed()):
            warn(
                f"logits of a training step are read after its {changed} have changed: they are of "
                "the new ones; ask for them with the option return_logits"
            )
        if not _has_memory(weight):
            weight, bias = gathered(self.head.weight), gathered(self.head.bias)
        with torch.inference_mode(self._inference_mode), torch.set_grad_enabled(self._grad_enabled):
            return self._of(weight, bias)

    def _changed(self) -> str:
        """What has changed, "weights" or "hidden states", as far as it can be seen; or ""."""
        count, hidden, *seen = self._stamp
        if hidden != _version(self.hidden):
            return "hidden states"
        other = _has_memory(self.weight) and list(_stamp_of(self.weight)) != seen
        return "weights" if other or count != self._optimizer_steps.count else ""

    def _of(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        import torch
        from torch.nn import functional

        dtype = self.hidden.dtype
        with torch.autocast(self.hidden.device.type, self._cast, enabled=self.casts):
            bias = None if bias is None else bias.to(dtype)
            logits = functional.linear(self.hidden, weight.to(dtype), bias)
            return apply_all(self.steps, logits)

    def stand_in(self) -> torch.Tensor | Logits:
        """A tensor in place of them; while torch.compile is tracing, this object."""
        import torch

        self.weight, self.bias = self.head.weight, self.head.bias
        if not torch.compiler.is_compiling():
            self._optimizer_steps.watch()
            self._stamp = (
                self._optimizer_steps.count,
                _version(self.hidden),
                *_stamp_of(self.weight),
            )
            inputs = self.hidden, self.weight, self.bias
            self.requires_grad = self._grad_enabled and any(
                tensor.requires_grad for tensor in inputs if tensor is not None
            )
        if torch.compiler.is_compiling():
            return self
        return deferred_tensor()(self, self.shape, self.dtype, self.hidden.device)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written into; 0 for one of the inference mode, which has no count."""
    return 0 if tensor.is_inference() else int(tensor._version)


def _stamp_of(weight: torch.Tensor) -> tuple[object, ...]:
    """What differs after a weight has changed, except by a fused optimizer."""
    return _version(weight), weight.data_ptr(), weight.dtype


def _has_memory(weight: torch.Tensor) -> bool:
    """Whether a weight still has memory: FSDP2 frees that of a weight which it has gathered."""
    return bool(weight.untyped_storage().size())


def gathered(parameter: nn.Parameter | None) -> torch.Tensor | None:
    """The whole of a parameter that FSDP2 has sharded; every rank has to call this at once.

    Its gradient is the mean over the ranks, as FSDP2 computes it. Others are returned as they are.
    """
    if parameter is None or not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda grad: grad / mesh.size())
    return full
