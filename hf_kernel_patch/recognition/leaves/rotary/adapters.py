"""Replacements of functions of q and k, one for each way to take their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_kernel_patch.recognition.known import Adapter
from hf_kernel_patch.recognition.leaves.rotary.serving import Rotated, Rotation, are_tensors, server
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch


def q_and_k(rotation: Rotation) -> Adapter:
    """As transformers 5 has it."""

    def adapter(site: Site) -> Callable[..., Rotated]:
        original: Callable[..., Rotated] = site.original
        serve = server(site, rotation)

        def apply_rotary_pos_emb(
            q: torch.Tensor,
            k: torch.Tensor,
            cos: torch.Tensor,
            sin: torch.Tensor,
            unsqueeze_dim: int = 1,
        ) -> Rotated:
            found = serve(q, k, cos, sin, unsqueeze_dim)
            if found is None:
                return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return found

        return apply_rotary_pos_emb

    return adapter


def q_and_k_with_positions(rotation: Rotation) -> Adapter:
    """As transformers 4 has it; the positions are not used."""

    def adapter(site: Site) -> Callable[..., Rotated]:
        original: Callable[..., Rotated] = site.original
        serve = server(site, rotation)

        def apply_rotary_pos_emb(
            q: torch.Tensor,
            k: torch.Tensor,
            cos: torch.Tensor,
            sin: torch.Tensor,
            position_ids: torch.Tensor | None = None,
            unsqueeze_dim: int = 1,
        ) -> Rotated:
            found = serve(q, k, cos, sin, unsqueeze_dim)
            if found is None:
                return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return found

        return apply_rotary_pos_emb

    return adapter


def q_and_perhaps_k(rotation: Rotation) -> Adapter:
    """q alone where there is no k, and not a tuple."""

    def adapter(site: Site) -> Callable[..., Rotated]:
        original: Callable[..., Rotated] = site.original
        serve = server(site, rotation._replace(optional=True))

        def apply_rotary_pos_emb(
            q: torch.Tensor,
            k: torch.Tensor | None = None,
            cos: torch.Tensor | None = None,
            sin: torch.Tensor | None = None,
            unsqueeze_dim: int = 1,
        ) -> Rotated:
            found = serve(q, k, cos, sin, unsqueeze_dim)
            if found is None:
                return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return found[0] if k is None else found

        return apply_rotary_pos_emb

    return adapter


#: (cos, sin) -> (unsqueeze_dim, why the original has to run or None).
_HeadsDimension = Callable[["torch.Tensor", "torch.Tensor"], tuple[int, str | None]]


def without_unsqueeze_dim(dimension: _HeadsDimension) -> Callable[[Rotation], Adapter]:
    """Where no argument says which dimension of q and k the heads are; ``dimension`` does."""

    def for_rotation(rotation: Rotation) -> Adapter:
        def adapter(site: Site) -> Callable[..., Rotated]:
            original: Callable[..., Rotated] = site.original
            serve = server(site, rotation)

            def apply_rotary_pos_emb_vision(
                q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
            ) -> Rotated:
                found = serve(q, k, cos, sin, *dimension(cos, sin))
                return original(q, k, cos, sin) if found is None else found

            return apply_rotary_pos_emb_vision

        return adapter

    return for_rotation


def before_size(cos: torch.Tensor, sin: torch.Tensor) -> tuple[int, str | None]:
    """q and k are (S, heads, D)."""
    return -2, None


def second(cos: torch.Tensor, sin: torch.Tensor) -> tuple[int, str | None]:
    """``cos[:, None, :]``."""
    return 1, None


def before_tokens(cos: torch.Tensor, sin: torch.Tensor) -> tuple[int, str | None]:
    """q and k are (B, heads, S, D), and cos and sin, of (S, D) or (1, S, D), stay what they are."""
    if not are_tensors(cos, sin) or cos.dim() == sin.dim() == 2:
        return 0, None
    if cos.dim() == sin.dim() == 3 and cos.shape[0] == sin.shape[0] == 1:
        return 1, None
    return 0, "cos and sin are not of two dimensions"


def tokens_of_k(rotation: Rotation) -> Adapter:
    """k may have more tokens, which are not rotated, or repeat the angles; that is not served."""

    def adapter(site: Site) -> Callable[..., Rotated]:
        original: Callable[..., Rotated] = site.original
        serve = server(site, rotation)

        def apply_rotary_pos_emb_2d(
            q: torch.Tensor,
            k: torch.Tensor,
            cos: torch.Tensor,
            sin: torch.Tensor,
            num_k_exclude_rope: int = 0,
            repeat_freqs_k: bool = False,
        ) -> Rotated:
            unsqueeze_dim, fallback = before_tokens(cos, sin)
            if are_tensors(q, k) and (num_k_exclude_rope or k.shape[-2] != q.shape[-2]):
                fallback = "k has other tokens than q"
            found = serve(q, k, cos, sin, unsqueeze_dim, fallback)
            if found is None:
                return original(q, k, cos, sin, num_k_exclude_rope, repeat_freqs_k)
            return found

        return apply_rotary_pos_emb_2d

    return adapter


def sections(rotation: Rotation) -> Adapter:
    """cos and sin are (3, B, S, R), for time, height and width, of which sections are taken."""

    def adapter(site: Site) -> Callable[..., Rotated]:
        original: Callable[..., Rotated] = site.original
        serve = server(site, rotation)
        import torch

        def merged(angle: torch.Tensor, section: list[int]) -> torch.Tensor:
            parts = angle.split(section * 2, dim=-1)
            return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)

        def apply_multimodal_rotary_pos_emb(
            q: torch.Tensor,
            k: torch.Tensor,
            cos: torch.Tensor,
            sin: torch.Tensor,
            mrope_section: list[int],
            unsqueeze_dim: int = 1,
        ) -> Rotated:
            found = None
            if site.in_force():
                both = merged(cos, mrope_section), merged(sin, mrope_section)
                found = serve(q, k, *both, unsqueeze_dim)
            if found is None:
                return original(q, k, cos, sin, mrope_section, unsqueeze_dim=unsqueeze_dim)
            return found

        return apply_multimodal_rotary_pos_emb

    return adapter


def after_prefix(rotation: Rotation) -> Adapter:
    """Of (B, heads, S, D) the last tokens alone are rotated, as many as cos (S', D) has."""

    def adapter(site: Site) -> Callable[..., Rotated]:
        original: Callable[..., Rotated] = site.original
        serve = server(site, rotation)
        import torch

        def apply_rotary_pos_emb(
            q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kwargs: object
        ) -> Rotated:
            fallback, prefixes, rest = None, None, [q, k]
            if are_tensors(q, k, cos, sin):
                patches = sin.shape[-2]
                before = q.shape[-2] - patches
                if q.device.type == "cpu" and not site.explicit:
                    fallback = "tokens after a prefix are no faster on a CPU than the original"
                elif before < 0 or cos.dim() != 2 or k.shape[-2] != q.shape[-2]:
                    fallback = "cos is not that of the last tokens of q and k"
                elif before:
                    parts = [x.split((before, patches), dim=-2) for x in (q, k)]
                    prefixes, rest = [x for x, _ in parts], [x for _, x in parts]
            found = serve(*rest, cos, sin, 0, fallback)
            if found is None:
                return original(q, k, cos, sin, **kwargs)
            if prefixes is None:
                return found
            return tuple(torch.cat(both, dim=-2) for both in zip(prefixes, found))

        return apply_rotary_pos_emb

    return adapter
