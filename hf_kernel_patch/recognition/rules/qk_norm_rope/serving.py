"""What runs in place of the norms of q and k and of the rotary function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hf_kernel_patch.ops.qk_norm_rope import QK_NORM_ROPE
from hf_kernel_patch.recognition.leaves.norms import modeling_of, norm_arguments, norms_in
from hf_kernel_patch.recognition.rules.qk_norm_rope.rotation import ROTATIONS, rotation_of
from hf_kernel_patch.recognition.site import Site


def serve(site: Site) -> Callable[..., Any]:
    """(module, q_norm, k_norm, rotary, q, k, cos, sin) -> rotated q and k.

    q and k come before their norms, which are False where they are not asked for: as (B, S, heads,
    D) with ``transpose``, else as the rotary function takes them, (B, heads, S, D) or for images
    (S, heads, D). The results are of the shapes that the rotary function gives.
    """
    import torch

    tensor = torch.Tensor
    known = norms_in(modeling_of(site.original))
    # A kernel written by somebody else may not know the op's last arguments.
    takes_options = all(
        _takes(one, len(QK_NORM_ROPE.parameters)) for one in (site.op, site.kernel.refuse)
    )

    def arguments_of(
        q_norm: Any, k_norm: Any, rotary: Any, q: Any, k: Any, cos: Any, sin: Any, transpose: bool
    ) -> tuple[tuple[Any, ...], str | None]:
        """The op's arguments, and why it may not have them."""
        none = q, k, cos, sin
        if q_norm is False or k_norm is False:
            return none, "the norms of q and k are not asked for"
        (q_weight, *q_options), why_not = norm_arguments(q_norm, known)
        (k_weight, *k_options), why_k_not = norm_arguments(k_norm, known)
        why_not = why_not or why_k_not
        if why_not is None and q_options != k_options:
            why_not = "the norms of q and k differ"
        leaf = rotation_of(rotary)
        rotation = ROTATIONS.get(leaf)
        why_not = why_not or (leaf if rotation is None else None)
        if why_not is not None or rotation is None:
            return none, why_not
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
        arguments = (q, k, q_weight, k_weight, q_options[0], cos, sin, heads, *q_options[1:])
        if rotation.options:
            if not takes_options:
                return none, f"{site.kernel.kernel_id} knows no {leaf}"
            arguments = (*arguments, *rotation.options)
        return arguments, None

    def qk_norm_rope(
        module: Any,
        q_norm: Any,
        k_norm: Any,
        rotary: Any,
        q: Any,
        k: Any,
        cos: Any,
        sin: Any,
        transpose: bool = True,
    ) -> Any:
        if site.active:
            arguments, why_not = arguments_of(q_norm, k_norm, rotary, q, k, cos, sin, transpose)
            if not site.declines(*arguments, unless=why_not, module=module):
                q_out, k_out = site.op(*arguments)
                return (q_out[0], k_out[0]) if q.dim() == 3 else (q_out, k_out)
        if q_norm is not False:
            q = q_norm(q)
        if k_norm is not False:
            k = k_norm(k)
        if transpose:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return rotary(q, k, cos, sin)

    return qk_norm_rope


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function takes so many arguments by their places, as far as it says."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # it does not say what it takes
        return True
    return True
