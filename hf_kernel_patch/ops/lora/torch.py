"""lora in plain PyTorch: the adapter is added within its product, and x is kept once."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops._shared.autograd import Gradients, Tensors, differentiable
from hf_kernel_patch.ops.lora import reference


def lora(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
    b_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.lora.reference.lora`.

    The layer's product is in x's dtype, the adapter's are in a's, as the original has them.
    """
    given = {"x": x, "a": a, "b": b, "weight": weight, "bias": bias, "base": base}
    given |= {"dropped": dropped, "b_bias": b_bias, "scale": scale}
    tensors = {name: one for name, one in given.items() if one is not None}
    return _lora(tuple(tensors.values()), (float(scaling), *tensors))


def _named(tensors: Tensors, options: tuple[Any, ...]) -> tuple[dict[str, torch.Tensor], float]:
    """(name -> tensor, the scaling)."""
    scaling, *names = options
    return dict(zip(names, tensors, strict=True)), scaling


def _plain(tensors: Tensors, options: tuple[Any, ...]) -> torch.Tensor:
    given, scaling = _named(tensors, options)
    dtype = torch.promote_types(given["x"].dtype, given["a"].dtype)
    return reference.lora(scaling=scaling, dtype=dtype, **given)


def _forward(tensors: Tensors, options: tuple[Any, ...]) -> tuple[torch.Tensor, Tensors]:
    """Keeps the adapter's inner values and, with a scale, what is scaled."""
    given, scaling = _named(tensors, options)
    x, a, b, bias = given["x"], given["a"], given["b"], given.get("bias")
    inner = F.linear(_rows(given.get("dropped", x), a.dtype), a)
    base = given.get("base")
    if base is None:
        out = F.linear(_rows(x), given["weight"], None if "scale" in given else bias)
    else:
        out = _rows(base)
    dtype = out.dtype
    if "scale" in given:  # its products are in the wider dtype, as the original has them
        out = out.to(torch.promote_types(dtype, given["scale"].dtype))
    out = _plus(out, inner, b.t(), scaling, in_place=base is None)
    if "b_bias" in given:
        out.add_(given["b_bias"], alpha=scaling)
    kept: Tensors = (inner,)
    if "scale" in given:
        kept = inner, out
        out = _times(out, given["scale"])
        if bias is not None:
            out.add_(bias)
    out = out if out.dtype == dtype else out.to(dtype)
    if x.dim() != 2:
        # No view of something else: who adds to the result in place may do so with the original's.
        out = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], b.shape[0]])
    return out, kept


def _backward(
    grad: torch.Tensor,
    tensors: Tensors,
    kept: Tensors,
    options: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> Gradients:
    given, scaling = _named(tensors, options)
    wanted = {name for name, need in zip(given, needed, strict=True) if need}
    x, a, b = given["x"], given["a"], given["b"]
    seen = given.get("dropped", x)
    shape, grad = grad.shape, _rows(grad)
    found: dict[str, torch.Tensor] = {}
    if "bias" in wanted:
        found["bias"] = grad.sum(0)
    outer = grad.to(a.dtype)
    if "scale" in given:
        if "scale" in wanted:
            exact = torch.promote_types(kept[1].dtype, torch.float32)
            found["scale"] = (grad.to(exact) * kept[1]).sum(0)
        outer = _times(outer, given["scale"])
        grad = outer.to(grad.dtype)
    if "b_bias" in wanted:
        found["b_bias"] = outer.sum(0) * scaling
    if "b" in wanted:
        found["b"] = _product(outer.t(), kept[0], scaling)
    through = wanted & {"a", "dropped" if "dropped" in given else "x"}
    inner_grad = _product(outer, b, scaling) if through else None
    if inner_grad is not None and "a" in wanted:
        found["a"] = inner_grad.t() @ _rows(seen, a.dtype)
    if inner_grad is not None and "dropped" in wanted:
        found["dropped"] = (inner_grad @ a).view_as(seen)
    if "x" in wanted:
        found["x"] = _grad_of_x(grad, inner_grad, given).view_as(x)
    if "weight" in wanted:
        found["weight"] = grad.t() @ _rows(x)
    if "base" in wanted:
        found["base"] = grad.view(shape)
    return [
        found[name].to(tensor.dtype) if name in wanted else None for name, tensor in given.items()
    ]


def _grad_of_x(
    grad: torch.Tensor, inner_grad: torch.Tensor | None, given: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Through the layer and, unless something was dropped for it, through the adapter."""
    x, a, weight = given["x"], given["a"], given.get("weight")
    adapter = None if "dropped" in given else inner_grad
    if weight is None:
        return torch.zeros_like(_rows(x)) if adapter is None else adapter @ a
    found = grad @ weight
    return found if adapter is None else _plus(found, adapter, a)


def _rows(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(..., N) -> (M, N)."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if dtype is None or rows.dtype == dtype else rows.to(dtype)


def _plus(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scaling: float = 1.0,
    in_place: bool = True,
) -> torch.Tensor:
    """out + scaling * (left @ right), in the wider dtype; of one dtype it may be out itself."""
    if in_place and out.dtype == left.dtype:
        return out.addmm_(left, right, alpha=scaling)
    dtype = torch.promote_types(out.dtype, left.dtype)
    return torch.addmm(out.to(dtype), left.to(dtype), right.to(dtype), alpha=scaling)


def _product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * (left @ right), rounded once."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)


def _times(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """rows * scale in the rows' dtype, whatever the scale's."""
    return torch.mul(rows, scale, out=torch.empty_like(rows))


_lora = differentiable(_forward, _backward, _plain)
