"""What serves the calls of a rotary function, in whatever order it takes its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from hf_kernel_patch.ops.rope import ROPE
from hf_kernel_patch.ops.rope.shapes import ELEMENTS, HALVES, width_of
from hf_kernel_patch.recognition.leaves.signature import takes
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch


class Rotation(NamedTuple):
    """What a source text computes: the op's options, and what its arguments have to be like.

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


#: q and k rotated; k is None where there was none.
Rotated = tuple["torch.Tensor", "torch.Tensor | None"]
#: (q, k or None, cos, sin, unsqueeze_dim, why the original has to run or None) -> q and k rotated,
#: or None for a fallback: the original has to run.
Serve = Callable[..., Rotated | None]


def server(site: Site, rotation: Rotation) -> Serve:
    """What serves the calls of a site."""
    if rotation == Rotation(cast=rotation.cast, partial=rotation.partial):
        return _plain(site, rotation)
    return _with_options(site, rotation)


def _plain(site: Site, rotation: Rotation) -> Serve:
    """With the first six arguments of the op, which every kernel knows, and at the least cost."""
    rope: Callable[..., Rotated] = site.op
    falls_back, cast, partial = site.falls_back, rotation.cast, rotation.partial

    def serve(
        q: torch.Tensor,
        k: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int,
        fallback: str | None = None,
    ) -> Rotated | None:
        if falls_back(q, k, cos, sin, unsqueeze_dim, cast, unless=fallback):
            return None
        if k is None or not (partial or cos.shape[-1] == q.shape[-1]):
            return None  # the original raises an error
        return rope(q, k, cos, sin, unsqueeze_dim, cast)

    return serve


def _with_options(site: Site, rotation: Rotation) -> Serve:
    import torch

    tensor = torch.Tensor
    rope: Callable[..., Rotated] = site.op
    falls_back = site.falls_back
    cast, pairs, angles, upcast, partial, one_dtype, four, stacked, optional = rotation
    # Kernels written by somebody else may not know the newer options.
    older = None
    count = len(ROPE.parameters)
    if not (takes(rope, count) and takes(site.kernel.why_fallback, count)):
        older = f"{site.kernel.kernel_id} takes no pairs, angles and upcast, nor q alone"
    options: tuple[object, ...] = (pairs, angles, upcast)
    if options == (HALVES, ELEMENTS, False):
        options = ()
    missing, alone = older if options else None, older if optional else "there is no k"

    def unfit(
        q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> str | None:
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
        q: torch.Tensor,
        k: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int,
        fallback: str | None = None,
    ) -> Rotated | None:
        fallback = fallback or missing or unfit(q, k, cos, sin)
        if falls_back(q, k, cos, sin, unsqueeze_dim, cast, *options, unless=fallback):
            return None
        return rope(q, k, cos, sin, unsqueeze_dim, cast, *options)

    return serve


def are_tensors(*values: object) -> bool:
    """Whether their shapes are numbers: those of what torch.fx traces are not."""
    import torch

    return all(isinstance(value, torch.Tensor) for value in values)
