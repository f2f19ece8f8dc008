"""What serves the calls of a rotary function, however it takes its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from hf_kernel_patch.ops.rope import ROPE
from hf_kernel_patch.ops.rope.shapes import ELEMENTS, HALVES, width_of
from hf_kernel_patch.recognition.site import Site


class Rotation(NamedTuple):
    """What a text computes: the op's options, and what it asks of its arguments besides.

    Attributes:
        cast, pairs, angles, upcast: as the op takes them.
        partial: q may be wider than what is rotated.
        one_dtype: the result for k is of q's dtype.
        four: q and k are of four dimensions.
        stacked: cos and sin are first put into one tensor.
        optional: k may be None.
    """

    cast: bool = False
    pairs: str = HALVES
    angles: str = ELEMENTS
    upcast: bool = False
    partial: bool = False
    one_dtype: bool = False
    four: bool = False
    stacked: bool = False
    optional: bool = False


#: (q, k or None, cos, sin, unsqueeze_dim, why not) -> q and k rotated, or None: the original runs.
Serve = Callable[..., Any]


def server(site: Site, rotation: Rotation) -> Serve:
    """What serves the calls of a site."""
    _, pairs, angles, upcast, _, *asked = rotation
    if (pairs, angles, upcast) == (HALVES, ELEMENTS, False) and not any(asked):
        return _plain(site, rotation)
    return _any(site, rotation)


def _plain(site: Site, rotation: Rotation) -> Serve:
    """With the first six arguments of the op, which every kernel knows, and at the least cost."""
    rope, declines, cast, partial = site.op, site.declines, rotation.cast, rotation.partial

    def serve(
        q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int, why: str | None = None
    ) -> Any:
        if declines(q, k, cos, sin, unsqueeze_dim, cast, unless=why):
            return None
        if k is None or not (partial or cos.shape[-1] == q.shape[-1]):
            return None  # the original raises an error
        return rope(q, k, cos, sin, unsqueeze_dim, cast)

    return serve


def _any(site: Site, rotation: Rotation) -> Serve:
    import torch

    tensor = torch.Tensor
    rope, declines = site.op, site.declines
    cast, pairs, angles, upcast, partial, one_dtype, four, stacked, optional = rotation
    # Kernels written by somebody else may not know the newer options.
    older = None
    if not all(map(_takes_all, (rope, site.kernel.refuse))):
        older = f"{site.kernel.kernel_id} takes no pairs, angles and upcast, nor q alone"
    options: tuple[Any, ...] = (pairs, angles, upcast)
    if options == (HALVES, ELEMENTS, False):
        options = ()
    missing, alone = older if options else None, older if optional else "there is no k"

    def unfit(q: Any, k: Any, cos: Any, sin: Any) -> str | None:
        """Why the op would do something else than the original."""
        if not (isinstance(q, tensor) and isinstance(cos, tensor)):
            return None  # the site says so
        if not partial and width_of(cos, angles) != q.shape[-1]:
            return "cos is not as wide as q"
        if k is None:
            return alone
        if one_dtype and k.dtype != q.dtype:
            return "q and k are of different dtypes"
        if four and not q.dim() == k.dim() == 4:
            return "q and k are not of four dimensions"
        if stacked and cos.dtype != sin.dtype:
            return "cos and sin are of different dtypes"
        return None

    def serve(
        q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int, why: str | None = None
    ) -> Any:
        why = why or missing or unfit(q, k, cos, sin)
        if declines(q, k, cos, sin, unsqueeze_dim, cast, *options, unless=why):
            return None
        return rope(q, k, cos, sin, unsqueeze_dim, cast, *options)

    return serve


def _takes_all(function: Callable[..., Any]) -> bool:
    """Whether a kernel knows all of the op's arguments."""
    try:
        inspect.signature(function).bind(*ROPE.parameters)
    except TypeError:
        return False
    except ValueError:  # it does not say what it takes
        return True
    return True


def are_tensors(*values: Any) -> bool:
    """Whether their shapes are numbers: those of what torch.fx traces are not."""
    import torch

    return all(isinstance(value, torch.Tensor) for value in values)
