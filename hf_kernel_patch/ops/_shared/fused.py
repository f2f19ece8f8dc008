"""The plumbing of an op whose backward is written by hand: autograd and operators, made once.

Eager calls go without torch's dispatcher; torch.compile sees operators of the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hf_kernel_patch.ops._shared.autograd import Options, Tensors, eager_gradients

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

Function = Callable[..., Any]


class Backward(NamedTuple):
    """A backward, called with the outputs' gradients, what was saved, the options, and ``needed``.

    The last has a truth for each of the op's tensors: whether it needs a gradient. The gradients of
    the first tensors are returned, with None for what was not computed.
    """

    #: Of the operator; ``needed`` is ``bool[]``.
    schema: str
    function: Function
    #: The same in empty tensors.
    fake: Function
    #: The op in plain PyTorch, of what was saved and the options: for gradients of gradients.
    plain: Function


def fused_op(
    name: str,
    schema: str,
    forward: Function,
    fake: Function,
    backward: Backward | None,
    *,
    save: Function | None = None,
    differentiate: Function | None = None,
    depends: Sequence[tuple[int, ...]] = (),
) -> tuple[Function, Function]:
    """An op in two forms: the operator that torch.compile sees, and the eager call with gradients.

    The operator takes its inputs by place, the other ``(options, *tensors)``. A call that needs no
    gradient goes to ``forward`` itself, which is the caller's to decide: so it costs the least host
    time.

    Args:
        name, schema: of the operator. That of its backward is called ``name``_backward.
        forward: (tensors, then options) -> an output or a tuple of outputs, all new.
        fake: the same in empty tensors.
        backward: None for an op that is its own backward, given other options.
        save: (ctx, tensors, options, output): keeps what the backward needs, and sets
            ``ctx.options``; without it, that is all tensors and the options.
        differentiate: (ctx, gradients of the outputs, needed, a backward) -> gradients of the first
            tensors by that backward: the function, its operator, or one that is differentiable.
        depends: for each output, the tensors that it has a gradient by; without it, all of them.
    """
    operator: Any = torch.library.custom_op(
        f"hf_kernel_patch::{name}",
        lambda *inputs: forward(*split(inputs)),
        mutates_args=(),
        schema=schema,
    )
    operator.register_fake(lambda *inputs: fake(*split(inputs)))
    arguments = operator._opoverload._schema.arguments
    is_tensor = [str(one.type) in ("Tensor", "Optional[Tensor]") for one in arguments]
    count = sum(is_tensor)
    last = 1 + max((one for on in depends for one in on), default=-1)
    places = sorted(range(len(arguments)), key=lambda place: not is_tensor[place])

    def split(inputs: Options) -> Sequence[Any]:
        """The operator's inputs, tensors first; the dispatcher leaves out what is the default."""
        rest = [one.default_value for one in arguments[len(inputs) :]]
        return [(*inputs, *rest)[place] for place in places]

    def save_all(
        ctx: FunctionCtx, tensors: Sequence[torch.Tensor], options: Options, output: object
    ) -> None:
        ctx.save_for_backward(*tensors)
        ctx.options = options

    def call(
        ctx: FunctionCtx,
        grads: Sequence[torch.Tensor | None],
        needed: Sequence[bool],
        backward: Function,
    ) -> Any:
        return backward(*grads, *ctx.saved_tensors, *ctx.options, needed)

    remember, gradients = save or save_all, differentiate or call

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, options: Options, *tensors: torch.Tensor) -> Any:
            output = forward(*tensors, *options)
            remember(ctx, tensors, options, output)
            if depends and False in (needed := ctx.needs_input_grad[1 : last + 1]):
                by = zip(output, depends)
                frozen = [out for out, on in by if not any(needed[one] for one in on)]
                ctx.mark_non_differentiable(*frozen)
            return output

        @staticmethod
        def backward(
            ctx: FunctionCtx, *grads: torch.Tensor | None
        ) -> tuple[torch.Tensor | None, ...]:
            how = again(ctx, grads) if torch.is_grad_enabled() else direct
            found = gradients(ctx, grads, ctx.needs_input_grad[1:], how)
            return None, *found, *(None,) * (count - len(found))

    def again(ctx: FunctionCtx, grads: Tensors) -> Function:
        if backward is None:
            return lambda *inputs: Fused.apply(inputs[count:], *inputs[:count])
        return _through(backward.plain, grads, ctx.options)

    direct = forward if backward is None else backward.function
    traced = operator if backward is None else _backward_operator(name, backward)

    def setup_context(ctx: FunctionCtx, inputs: Options, output: object) -> None:
        inputs = tuple(split(inputs))
        remember(ctx, inputs[:count], inputs[count:], output)

    def operator_backward(
        ctx: FunctionCtx, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        needed = [ctx.needs_input_grad[place] for place in places[:count]]
        found = gradients(ctx, grads, needed, traced)
        made: list[torch.Tensor | None] = [None] * len(arguments)
        for place, grad, need in zip(places, found, needed):
            made[place] = grad if need else None
        return tuple(made)

    operator.register_autograd(operator_backward, setup_context=setup_context)
    return operator, Fused.apply


def _through(plain: Function, grads: Tensors, options: Options) -> Function:
    """A backward as ``Backward.function``, through plain autograd."""

    def backward(*inputs: Any) -> list[torch.Tensor | None]:
        saved = inputs[len(grads) : len(inputs) - len(options) - 1]
        return eager_gradients(lambda *tensors: plain(*tensors, *options), saved, grads)

    return backward


def _backward_operator(name: str, backward: Backward) -> Function:
    """An operator returns no None: for one it gives an empty tensor."""

    def without_none(function: Function) -> Function:
        def run(*inputs: Any) -> tuple[torch.Tensor, ...]:
            like = next(one for one in inputs if isinstance(one, torch.Tensor))
            return tuple(like.new_empty(0) if one is None else one for one in function(*inputs))

        return run

    operator = torch.library.custom_op(
        f"hf_kernel_patch::{name}_backward",
        without_none(backward.function),
        mutates_args=(),
        schema=backward.schema,
    )
    operator.register_fake(without_none(backward.fake))
    return operator
