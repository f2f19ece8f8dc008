"""What runs in place of the norms of q and k and of the rotary function."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Literal

from hf_kernel_patch.ops.qk_norm_rope import QK_NORM_ROPE
from hf_kernel_patch.recognition.leaves.norms import modeling_of, norm_arguments, norms_in
from hf_kernel_patch.recognition.leaves.signature import takes
from hf_kernel_patch.recognition.rules.qk_norm_rope.rotation import ROTATIONS, rotation_of
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Rotated q and k.
Rotated = tuple["torch.Tensor", "torch.Tensor"]


def serve(site: Site) -> Callable[..., Rotated]:
    """(module, q_norm, k_norm, rotary, q, k, cos, sin) -> rotated q and k.

    q and k come before their norms: as (B, S, heads, D) with ``transpose``, else as the rotary
    function takes them, (B, heads, S, D) or for images (S, heads, D). A norm is False where the
    original's condition leaves it out. The results have the shapes of the rotary function's.
    """
    import torch

    tensor = torch.Tensor
    known = norms_in(modeling_of(site.original))
    op: Callable[..., Rotated] = site.op
    # A kernel that somebody else wrote may not know the op's last arguments.
    count = len(QK_NORM_ROPE.parameters)
    takes_options = takes(op, count) and takes(site.kernel.why_fallback, count)

    def arguments_of(
        q_norm: nn.Module | Literal[False],
        k_norm: nn.Module | Literal[False],
        rotary: FunctionType,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        transpose: bool,
    ) -> tuple[tuple[object, ...], str | None]:
        """The op's arguments, and why the original has to run, or None."""
        none = q, k, cos, sin
        if q_norm is False or k_norm is False:
            return none, "the norms of q and k are not asked for"
        (q_weight, *q_options), fallback = norm_arguments(q_norm, known)
        (k_weight, *k_options), k_fallback = norm_arguments(k_norm, known)
        fallback = fallback or k_fallback
        if fallback is None and q_options != k_options:
            fallback = "the norms of q and k differ"
        leaf = rotation_of(rotary)
        rotation = ROTATIONS.get(leaf)
        fallback = fallback or (leaf if rotation is None else None)
        if fallback is not None or rotation is None:
            return none, fallback
        if q_weight is None or k_weight is None:
            return none, "a norm has no weight"
        if not (isinstance(q, tensor) and isinstance(k, tensor)):
            return none, "q or k is no tensor"
        if not (isinstance(cos, tensor) and isinstance(sin, tensor)):
            return none, "cos or sin is no tensor"
        if not rotation.partial and cos.shape[-1] != q.shape[-1]:
            return none, "cos is not as wide as q"
        if rotation.one_dtype and not (q.dtype == k.dtype and q_weight.dtype == k_weight.dtype):
            return none, "q and k are of different dtypes"
        heads = rotation.heads
        if heads == 2:
            if transpose:
                return none, "q and k are transposed before a rotary function of images"
            if q.dim() == 3:
                q, k, cos, sin = (x.unsqueeze(0) for x in (q, k, cos, sin))
        elif not transpose:
            if q.dim() != 4 or k.dim() != 4:
                return none, "q and k are not of four dimensions"
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        arguments: tuple[object, ...]
        arguments = (q, k, q_weight, k_weight, q_options[0], cos, sin, heads, *q_options[1:])
        if rotation.options:
            if not takes_options:
                return none, f"{site.kernel.kernel_id} knows no {leaf}"
            arguments = (*arguments, *rotation.options)
        return arguments, None

    def qk_norm_rope(
        module: nn.Module,
        q_norm: nn.Module | Literal[False],
        k_norm: nn.Module | Literal[False],
        rotary: FunctionType,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        transpose: bool = True,
    ) -> Rotated:
        if site.active:
            arguments, fallback = arguments_of(q_norm, k_norm, rotary, q, k, cos, sin, transpose)
            if not site.falls_back(*arguments, unless=fallback, module=module):
                q_out, k_out = op(*arguments)
                return (q_out[0], k_out[0]) if q.dim() == 3 else (q_out, k_out)
        if q_norm is not False:
            q = q_norm(q)
        if k_norm is not False:
            k = k_norm(k)
        if transpose:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        rotated: Rotated = rotary(q, k, cos, sin)
        return rotated

    return qk_norm_rope
