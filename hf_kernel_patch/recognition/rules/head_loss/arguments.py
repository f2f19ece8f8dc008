"""The arguments of a loss function: which the op takes as the original does."""

from __future__ import annotations

from typing import Any

#: The loss's first parameters, by which it may be called.
NAMES = ("logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels")
#: Those that it has given already where it calls ``fixed_cross_entropy`` with all others.
_TAKEN = {"source", "target"}


def given_to_loss(args: Any, kwargs: Any, aligned: bool) -> tuple[dict[str, Any], str | None]:
    """A loss's arguments by name, and why the original has to judge, and perhaps refuse, them.

    ``aligned`` says that it scores each position against its own label: those are then
    ``shift_labels``, and it knows of no others.
    """
    names = NAMES[:-1] if aligned else NAMES
    given = {**dict(zip(names, args)), **kwargs}
    missing = len(given) != len(args) + len(kwargs) or "labels" not in given
    if missing or len(args) > len(names) or any(name in given for name in _TAKEN):
        return given, "an argument that the loss does not take"
    if aligned:
        given["shift_labels"] = given["labels"]
    return given, _why_not(given)


def _why_not(given: dict[str, Any]) -> str | None:
    if type(given.get("ignore_index", -100)) is not int:
        return "an ignore_index that is no int"
    shifted = given.get("shift_labels")
    return _why_not_labels(given["labels"] if shifted is None else shifted, shifted) or (
        _why_not_items(given.get("num_items_in_batch"))
    )


def _why_not_labels(scored: Any, shifted: Any) -> str | None:
    import torch

    if not isinstance(scored, torch.Tensor):
        return "labels that are no tensor"
    if scored.dtype is not torch.int64:
        return f"labels in {str(scored.dtype).removeprefix('torch.')}"
    if scored.dim() == 0 or (shifted is not None and not shifted.is_contiguous()):
        return "labels of a shape that the loss does not take"
    return None


def _why_not_items(items: Any) -> str | None:
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
