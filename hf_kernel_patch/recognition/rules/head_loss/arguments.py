"""The arguments of a loss function: which the op takes as the original does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: What a user gives a loss, which may be anything.
Argument = Any

#: The loss's first parameters, by which it may be called.
NAMES = ("logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels")
#: Those of ``fixed_cross_entropy`` that the loss gives itself, besides all others that it is given.
_TAKEN = {"source", "target"}


def given_to_loss(
    args: Sequence[Argument], kwargs: Mapping[str, Argument], aligned: bool
) -> tuple[dict[str, Argument], str | None]:
    """A loss's arguments by name, and why the original has to run, or None.

    ``aligned`` says that the loss scores each position against its own label and has no parameter
    ``shift_labels``; the labels stand under that name then, as the op takes them.
    """
    names = NAMES[:-1] if aligned else NAMES
    given = {**dict(zip(names, args)), **kwargs}
    missing = len(given) != len(args) + len(kwargs) or "labels" not in given
    if missing or len(args) > len(names) or any(name in given for name in _TAKEN):
        return given, "an argument that the loss does not take"
    if aligned:
        given["shift_labels"] = given["labels"]
    return given, _fallback(given)


def _fallback(given: Mapping[str, Argument]) -> str | None:
    if type(given.get("ignore_index", -100)) is not int:
        return "an ignore_index that is no int"
    shifted = given.get("shift_labels")
    return _labels_fallback(given["labels"] if shifted is None else shifted, shifted) or (
        _items_fallback(given.get("num_items_in_batch"))
    )


def _labels_fallback(scored: Argument, shifted: Argument) -> str | None:
    import torch

    if not isinstance(scored, torch.Tensor):
        return "labels that are no tensor"
    if scored.dtype is not torch.int64:
        return f"labels in {str(scored.dtype).removeprefix('torch.')}"
    if scored.dim() == 0 or (shifted is not None and not shifted.is_contiguous()):
        return "labels of a shape that the loss does not take"
    return None


def _items_fallback(items: Argument) -> str | None:
    import torch

    if items is None or isinstance(items, float):
        return None
    if isinstance(items, int):
        return None if abs(items) < 2**63 else "a num_items_in_batch that no tensor holds"
    if not isinstance(items, torch.Tensor):
        return f"num_items_in_batch is a {type(items).__name__}"
    if items.is_complex() or items.requires_grad:
        return "a num_items_in_batch that is complex or needs a gradient"
    return None
