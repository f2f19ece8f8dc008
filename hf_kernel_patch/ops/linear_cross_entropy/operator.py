"""The loss as operators of PyTorch's dispatcher, which torch.compile sees as one node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.linear_cross_entropy.function import (
    Backend,
    Options,
    Problem,
    finish,
    folds,
    forward,
    late,
)

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

_PROBLEM = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor divisor"
_OPTIONS = (
    "bool[] needed, float scale, float? softcap, int ignore_index, float label_smoothing, "
    "float z_loss, bool metrics, bool exact, float? memory_mib"
)
_FLOAT = torch.float32
Tensors = tuple[torch.Tensor, ...]


def operator_of(backend: Backend, name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Registers the operators ``name`` and ``name``_backward; takes what ``_Loss.apply`` takes."""

    def run(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        targets: torch.Tensor,
        divisor: Any,
        *rest: Any,
    ) -> Tensors:
        needed, *options = rest
        problem = Problem(hidden, weight, bias, targets, Options(*options))
        sums, logs, found = forward(problem, divisor, backend, tuple(needed))
        if logs is not None:  # of a size that is known without the labels
            logs = F.pad(logs, (0, len(hidden) - logs.shape[1]))
        return sums[0] / divisor, sums, *_given(hidden, [logs, *(found or (None,) * 3)])

    def fake(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *rest: Any) -> Tensors:
        needed, *options = rest[2:]
        exact, some = Options(*options).exact, any(needed)
        logs = hidden.new_empty(2, len(hidden), dtype=_FLOAT) if exact and some else None
        early = [wanted and not exact for wanted in needed]
        wide = None if folds(hidden.dtype) else _FLOAT
        made = _like((hidden, weight, bias), early, (wide,) * 3)
        first = hidden.new_empty((), dtype=_FLOAT), hidden.new_empty(3, dtype=_FLOAT)
        return *first, *_given(hidden, [logs, *made])

    def run_backward(
        grad: torch.Tensor,
        logs: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        targets: torch.Tensor,
        *rest: Any,
    ) -> Tensors:
        divisor, needed, *options = rest
        problem = Problem(hidden, weight, bias, targets, Options(*options))
        return _given(hidden, late(problem, divisor, logs, grad, backend, tuple(needed)))

    def fake_backward(
        grad: torch.Tensor,
        logs: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        *rest: Any,
    ) -> Tensors:
        return _given(hidden, _like((hidden, weight, bias), rest[2], (None,) * 3))

    outputs = ", ".join(["Tensor"] * 6)
    operator = torch.library.custom_op(
        name, run, mutates_args=(), schema=f"({_PROBLEM}, {_OPTIONS}) -> ({outputs})"
    )
    operator.register_fake(fake)
    back = torch.library.custom_op(
        f"{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor grad, Tensor logs, {_PROBLEM}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    )
    back.register_fake(fake_backward)

    def remember(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.needed = inputs[:6]
        ctx.options = Options(*inputs[6:])
        ctx.save_for_backward(*tensors, *output[2:])

    def differentiate(
        ctx: FunctionCtx, grad: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        *tensors, divisor, logs, first, second, third = ctx.saved_tensors
        rest = (None,) * (2 + len(ctx.options) + 1)
        if ctx.options.exact:
            made = back(grad, logs, *tensors, divisor, ctx.needed, *ctx.options)
            return *(one if wanted else None for one, wanted in zip(made, ctx.needed)), *rest
        given = [one if w else None for one, w in zip((first, second, third), ctx.needed)]
        return *finish(tensors[:3], divisor, grad, given, torch.mul), *rest

    operator.register_autograd(differentiate, setup_context=remember)

    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        targets: torch.Tensor,
        divisor: Any,
        _: object,
        options: Options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grads = torch.is_grad_enabled()
        needed = [grads and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        loss, sums, *_ = operator(hidden, weight, bias, targets, divisor, needed, *options)
        return loss, sums.detach()

    return apply


def _given(hidden: torch.Tensor, found: Any) -> Tensors:
    """An empty tensor, each its own, for None, as operators return no None."""
    return tuple(hidden.new_empty(0) if one is None else one for one in found)


def _like(
    tensors: Tensors, wanted: Iterable[bool], dtypes: Iterable[torch.dtype]
) -> list[torch.Tensor | None]:
    """Dense tensors of the same sizes for those that are wanted."""
    return [
        torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
        if want
        else None
        for tensor, want, dtype in zip(tensors, wanted, dtypes, strict=True)
    ]
