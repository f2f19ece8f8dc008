"""The logits of a causal language model that are computed when they are first read."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.errors import KernelPatchWarning
from hf_kernel_patch.recognition.rules.head_loss.lazy import Pending, deferred_tensor

if TYPE_CHECKING:
    from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics

#: What is done to the logits between head and loss, in this order: divide or multiply them by a
#: number ("/", "*"), or cap their size at one ("cap", None for no cap).
Between = tuple[tuple[str, Any], ...]


def between_applied(between: Between, logits: Any) -> Any:
    """The logits after these steps."""
    import torch

    for step, by in between:
        if step == "/":
            logits = logits / by
        elif step == "*":
            logits = logits * by
        elif by is not None:
            logits = torch.tanh(logits / by) * by
    return logits


def scale_and_cap(between: Between) -> tuple[float, float | None]:
    """The factor of the logits and the cap of their size, as the op takes them."""
    scale, cap = 1.0, None
    for step, by in between:
        if step == "cap":
            cap = by
        else:
            scale = scale / by if step == "/" else scale * by
    return scale, cap


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

    def __init__(self, head: Any, between: Between, hidden: Any, steps: OptimizerSteps):
        import torch

        super().__init__()
        kind = hidden.device.type
        self.head, self.between, self.hidden, self._steps = head, between, hidden, steps
        #: The logits that the head itself gave, where they were needed in the forward.
        self.computed: Any = None
        self.casts = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if self.casts else hidden.dtype
        self._records, self._infers = torch.is_grad_enabled(), False
        self._stamp: tuple[Any, ...] = ()
        if not torch.compiler.is_compiling():  # which can't ask, or would compile anew for each
            self._infers = torch.is_inference_mode_enabled()

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
        if self._stamp and self._changed():
            warnings.warn(
                "logits of a training step are read after its weights have changed: they are of "
                "the new ones; ask for them with the option return_logits",
                KernelPatchWarning,
                stacklevel=5,
            )
        if not _has_memory(weight):
            weight, bias = gathered(self.head.weight), gathered(self.head.bias)
        with torch.inference_mode(self._infers), torch.set_grad_enabled(self._records):
            return self._of(weight, bias)

    def _changed(self) -> bool:
        """Whether the weight is not what it was, as far as can be told."""
        count, *seen = self._stamp
        if count != self._steps.count:
            return True
        return _has_memory(self.weight) and list(_stamp_of(self.weight)) != seen

    def _of(self, weight: Any, bias: Any) -> Any:
        import torch
        from torch.nn import functional

        kind = self.hidden.dtype
        with torch.autocast(self.hidden.device.type, self.dtype, enabled=self.casts):
            bias = None if bias is None else bias.to(kind)
            logits = functional.linear(self.hidden, weight.to(kind), bias)
            return between_applied(self.between, logits)

    def stand_in(self) -> Any:
        """A tensor in place of them; while torch.compile is tracing, this object."""
        import torch

        self.weight, self.bias = self.head.weight, self.head.bias
        if not torch.compiler.is_compiling():
            self._steps.watch()
            self._stamp = self._steps.count, *_stamp_of(self.weight)
        if torch.compiler.is_compiling():
            return self
        shape = (*self.hidden.shape[:-1], self.weight.shape[0])
        return deferred_tensor()(self, shape, self.dtype, self.hidden.device)


def _stamp_of(weight: Any) -> tuple[Any, ...]:
    """What differs where a weight has changed, but for a fused optimizer's step."""
    return weight._version, weight.data_ptr(), weight.dtype


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
