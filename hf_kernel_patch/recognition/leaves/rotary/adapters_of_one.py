"""Replacements of functions of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_kernel_patch.ops.rope.shapes import width_of
from hf_kernel_patch.recognition.known import Adapter
from hf_kernel_patch.recognition.leaves.rotary.serving import Rotation, are_tensors, server
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch


def one_tensor(rotation: Rotation) -> Adapter:
    """One tensor, in transformers 5."""

    def adapter(site: Site) -> Callable[..., torch.Tensor]:
        original, serve = site.original, server(site, rotation._replace(optional=True))

        def apply_rotary_pos_emb(
            x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
        ) -> torch.Tensor:
            found = serve(x, None, cos, sin, unsqueeze_dim)
            if found is None:
                return original(x, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return found[0]

        return apply_rotary_pos_emb

    return adapter


def one_tensor_with_positions(rotation: Rotation) -> Adapter:
    """One tensor, in transformers 4."""

    def adapter(site: Site) -> Callable[..., torch.Tensor]:
        original, serve = site.original, server(site, rotation._replace(optional=True))

        def apply_rotary_pos_emb(
            x: torch.Tensor,
            cos: torch.Tensor,
            sin: torch.Tensor,
            position_ids: torch.Tensor | None = None,
            unsqueeze_dim: int = 1,
        ) -> torch.Tensor:
            found = serve(x, None, cos, sin, unsqueeze_dim)
            if found is None:
                return original(x, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return found[0]

        return apply_rotary_pos_emb

    return adapter


def sin_first(rotation: Rotation) -> Adapter:
    """One tensor (B, S, heads, D), and sin before cos."""

    def adapter(site: Site) -> Callable[..., torch.Tensor]:
        original, serve = site.original, server(site, rotation._replace(optional=True))

        def apply_rotary_pos_emb(
            tensor: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor
        ) -> torch.Tensor:
            fits = not are_tensors(tensor, sin, cos) or cos.dim() == tensor.dim() - 1 == 3
            fallback = None if fits else "cos is not of three dimensions"
            found = serve(tensor, None, cos, sin, 2, fallback)
            return original(tensor, sin, cos) if found is None else found[0]

        return apply_rotary_pos_emb

    return adapter


def trailing(rotation: Rotation) -> Adapter:
    """One tensor, of which the last elements of a head are rotated, two for each of cos."""

    def adapter(site: Site) -> Callable[..., torch.Tensor]:
        original, serve = site.original, server(site, rotation._replace(optional=True))
        import torch

        def apply_rotary_pos_emb(
            x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
        ) -> torch.Tensor:
            first, last = None, x
            if are_tensors(x, cos, sin):
                width = width_of(cos, rotation.angles)
                if 0 < width < x.shape[-1]:
                    first, last = x.split((x.shape[-1] - width, width), dim=-1)
            found = serve(last, None, cos, sin, unsqueeze_dim)
            if found is None:
                return original(x, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return found[0] if first is None else torch.cat((first, found[0]), dim=-1)

        return apply_rotary_pos_emb

    return adapter
