"""The weights of experts, stacked or listed; imports no backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from hf_kernel_patch.ops.moe.grouped import Weights
    from hf_kernel_patch.ops.moe.reference import Down, GateUp


class Experts:
    """The weights of E experts: stacked as in transformers 5, or listed as in 4.

    Autograd functions and torch's custom operators take tensors one by one, so these come flat:

    - stacked: gate_up (E, 2 I, H), down (E, H, I);
    - listed: E gates (I, H), then E ups (I, H), then E downs (H, I).

    Nothing but the length tells one from the other, as three lists never make two tensors. This
    is the only place that knows.
    """

    def __init__(self, flat: Sequence[torch.Tensor]) -> None:
        self.flat = tuple(flat)
        self.listed = len(self.flat) != 2

    @classmethod
    def of(cls, gate_up: GateUp, down: Down) -> Experts:
        """The experts of the op's two arguments."""
        return cls(flatten(gate_up, down))

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.flat) // 3 if self.listed else self.flat[0].shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """Hidden size H and an expert's width I."""
        hidden, width = self.flat[-1].shape[-2:]
        return hidden, width

    @property
    def products(self) -> list[Weights]:
        """The weights of each product: gate_up and down, or the lists of gates, ups and downs."""
        if not self.listed:
            return list(self.flat)
        count = self.count
        return [list(self.flat[start : start + count]) for start in (0, count, 2 * count)]

    @property
    def arguments(self) -> tuple[GateUp, Down]:
        """gate_up and down as the op takes them."""
        if not self.listed:
            gate_up, down = self.flat
            return gate_up, down
        gates, ups, downs = self.products
        return list(zip(gates, ups, strict=True)), downs

    def any_needed(self, needed: Sequence[bool]) -> tuple[bool, bool]:
        """Whether some of gate_up and some of down need a gradient; ``needed`` is as ``flat``."""
        downs = self.count if self.listed else 1
        return any(needed[:-downs]), any(needed[-downs:])

    def split_gradients(
        self,
        gate_up: torch.Tensor | None,
        down: torch.Tensor | None,
        needed: Sequence[bool],
        used: Sequence[bool],
    ) -> list[torch.Tensor | None]:
        """The gradients of ``flat`` from those of stacked weights.

        Listed, each gets its part of them, if it needs one and its expert was used.
        """
        if not self.listed:
            return [gate_up, down]
        gates, ups = (None, None) if gate_up is None else gate_up.chunk(2, dim=1)
        gradients: list[torch.Tensor | None] = []
        count = self.count
        for i, needs in enumerate(needed):
            part, expert = divmod(i, count)
            stacked = (gates, ups, down)[part]
            wanted = stacked is not None and needs and used[expert]
            gradients.append(stacked[expert] if stacked is not None and wanted else None)
        return gradients


def flatten(gate_up: GateUp, down: Down) -> list[Any]:
    """All weights of the op's two arguments, in the order of ``Experts.flat``."""
    if not isinstance(down, (list, tuple)):
        return [gate_up, down]
    return [*(gate for gate, _ in gate_up), *(up for _, up in gate_up), *down]
