"""What the backends share: the arguments made plain, and when gradients are made and given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hf_kernel_patch.ops._shared.autograd import eager_gradients
from hf_kernel_patch.ops.linear_cross_entropy import reference
from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics, items, shifted

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

#: Above this share of labels that count, the few other rows cost less than taking them out.
DENSE = 0.9
Gradients = list[torch.Tensor | None]  # of hidden, weight and bias


class Options(NamedTuple):
    """The numbers of the loss, and how it is to be computed."""

    scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    metrics: bool = False
    #: The weight's gradient summed in float32 and rounded once, at the cost of a fourth product.
    exact: bool = False
    #: MiB that the logits in hand may take; None for what fills the matrix units.
    memory_mib: float | None = None


class Problem(NamedTuple):
    """What there is to compute; ``rows`` are those that count, None for all of them."""

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    targets: torch.Tensor  # (N,) int64
    options: Options


class Backend(NamedTuple):
    """The computation.

    ``early(problem, factor, needed)`` gives the sums and, times ``factor``, the gradients of the
    loss's sum that are needed. ``sums(problem)`` gives the sums and the logs of the softmax's
    denominators, (2, N) to be added, of which ``late(problem, logs, factor, needed)`` makes them;
    None where the gradients are always made early. The sums are float32 (3,): of the losses, of
    the labels that are the likeliest token, and of the entropies, the last two only with metrics.
    ``scale_`` multiplies a tensor in place by a scalar tensor.
    """

    early: Callable[..., tuple[torch.Tensor, Gradients]]
    sums: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None
    late: Callable[..., Gradients] | None
    scale_: Callable[[torch.Tensor, torch.Tensor], Any]


def loss_by(
    backend: Backend,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    shift_labels: torch.Tensor | None,
    options: Options,
    operator: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Any:
    """The op by a backend, its arguments as the reference takes them.

    ``operator`` takes the place of the autograd function while torch.compile is tracing.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():  # which a Function does not tell of
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    targets = shifted(labels, shift_labels, options.ignore_index).to(hidden.device)
    divisor = items(targets, num_items_in_batch, options.ignore_index)
    apart = isinstance(divisor, torch.Tensor) and _apart(divisor)
    single: Any = 1.0 if apart else divisor
    if not isinstance(single, torch.Tensor):
        single = torch.full((), single, dtype=torch.float32, device=hidden.device)
    with torch.autocast(device_type, enabled=False):
        run = _Loss.apply if operator is None else operator
        arguments = hidden.flatten(0, -2), weight, bias, targets, single.float().reshape(())
        loss, sums = run(*arguments, backend, options)
    if apart:
        loss = loss / divisor
    elif single.is_floating_point() and single.dtype is not torch.float32:
        loss = _by(single, loss, sums)
    elif single.dim():  # else there would be a view, of which FSDP2 warns
        loss = loss.reshape(single.shape)
    if not options.metrics:
        return loss
    counted = (targets != options.ignore_index).sum()
    return loss, Metrics(sums[1] / counted, sums[2] / counted)


def _apart(divisor: torch.Tensor) -> bool:
    """Whether it divides the sum by itself: there are as many losses, or they are rounded.

    A tensor with dimensions makes half precision of a float32, and so of its gradient.
    """
    half = divisor.is_floating_point() and divisor.itemsize < 4
    return divisor.numel() != 1 or (half and divisor.dim() > 0)


def _by(divisor: torch.Tensor, loss: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """The loss in the dtype and shape that PyTorch gives a float32 divided by this divisor."""
    exact = sums[0] / divisor
    loss = loss.to(exact.dtype).reshape(exact.shape)
    if loss.dtype is not torch.float32:
        with torch.no_grad():
            loss.copy_(exact)
    return loss


class _Loss(torch.autograd.Function):
    """Loss and sums; the gradients are made in the forward, while the logits are there."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        divisor: torch.Tensor,
        backend: Backend,
        options: Options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        problem = Problem(hidden, weight, bias, targets, options)
        ctx.backend, ctx.options = backend, options
        needed = ctx.needs_input_grad[:3]
        sums, logs, ctx.gradients = forward(problem, divisor, backend, needed)
        ctx.save_for_backward(hidden, weight, bias, targets, divisor, logs)
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return sums[0] / divisor, sums

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad: torch.Tensor | None, _: Any
    ) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        hidden, weight, bias, targets, divisor, logs = ctx.saved_tensors
        problem = Problem(hidden, weight, bias, targets, ctx.options)
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *again(problem, divisor, grad), None, None, None, None
        found, ctx.gradients = ctx.gradients, None  # given away, so made anew if asked for twice
        with torch.autocast(grad.device.type, enabled=False):
            if logs is not None:
                found = late(problem, divisor, logs, grad, ctx.backend, needed)
            else:
                if found is None:
                    _, _, found = forward(problem, divisor, ctx.backend, needed)
                assert found is not None
                found = finish(problem[:3], divisor, grad, found, ctx.backend.scale_)
        return *found, None, None, None, None


def forward(
    problem: Problem, divisor: torch.Tensor, backend: Backend, needed: tuple[bool, ...]
) -> tuple[torch.Tensor, torch.Tensor | None, Gradients | None]:
    """The sums, and either the denominators' logs or the gradients; neither if none is needed."""
    packed, rows = pack(problem)
    if backend.sums is not None and (problem.options.exact or not any(needed)):
        sums, logs = backend.sums(packed)
        return sums, logs if any(needed) else None, None
    factor = divisor.reciprocal() if folds(problem.hidden.dtype) else torch.ones_like(divisor)
    sums, found = backend.early(packed, factor, needed)
    return sums, None, unpack(found, rows, problem)


def folds(dtype: torch.dtype) -> bool:
    """Whether gradients are divided as they are made; float16 has too few exponents for that."""
    return dtype is not torch.float16


def late(
    problem: Problem,
    divisor: torch.Tensor,
    logs: torch.Tensor,
    grad: torch.Tensor,
    backend: Backend,
    needed: tuple[bool, ...],
) -> Gradients:
    """The gradients from the logs that ``forward`` gave, and from the loss's own, ``grad``."""
    assert backend.late is not None
    packed, rows = pack(problem)
    logs = logs[:, : len(packed.targets)].contiguous()
    return unpack(backend.late(packed, logs, grad / divisor, needed), rows, problem)


def finish(
    tensors: Sequence[torch.Tensor | None],
    divisor: torch.Tensor,
    grad: torch.Tensor,
    found: Gradients,
    scale: Callable[[torch.Tensor, torch.Tensor], Any],
) -> Gradients:
    """The gradients that ``forward`` made, times the loss's own, in the tensors' dtypes."""
    made: Gradients = []
    for one, like in zip(found, tensors):
        if one is None or like is None:
            made.append(None)
        elif folds(tensors[0].dtype):  # type: ignore[union-attr]
            made.append(scale(one, grad))
        else:  # the mean of no label has a gradient of zero
            factor = torch.where(divisor == 0, 0.0, grad / divisor)
            made.append((one * factor).to(like.dtype))
    return made


def pack(problem: Problem) -> tuple[Problem, torch.Tensor | None]:
    """The problem without the rows that do not count, and where the others were; None if all."""
    hidden, targets = problem.hidden, problem.targets
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        return problem, None
    rows = (targets != problem.options.ignore_index).nonzero().squeeze(1)
    if len(rows) > DENSE * len(targets):
        return problem, None
    return problem._replace(hidden=hidden[rows], targets=targets[rows]), rows


def unpack(found: Gradients, rows: torch.Tensor | None, problem: Problem) -> Gradients:
    """The gradients with the hidden states' rows back in their places."""
    grad = found[0]
    if rows is not None and grad is not None:
        found[0] = grad.new_zeros(problem.hidden.shape).index_copy_(0, rows, grad)
    return found


def again(problem: Problem, divisor: torch.Tensor, grad: torch.Tensor) -> Gradients:
    """The gradients through plain autograd, themselves differentiable."""
    options = problem.options

    def eager(hidden: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        total = reference.linear_cross_entropy(
            hidden.unsqueeze(0),
            weight,
            None,
            bias=bias[0] if bias else None,
            scale=options.scale,
            softcap=options.softcap,
            num_items_in_batch=1,
            ignore_index=options.ignore_index,
            shift_labels=problem.targets,
            label_smoothing=options.label_smoothing,
            z_loss=options.z_loss,
        )
        assert isinstance(total, torch.Tensor)
        return total / divisor

    tensors = [problem.hidden, problem.weight]
    tensors += [] if problem.bias is None else [problem.bias]
    found = eager_gradients(eager, tensors, (grad,))
    return [*found, *(None,) * (3 - len(found))]
