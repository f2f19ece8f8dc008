"""The arguments of rms_norm that few norms need: those after the gate."""

from __future__ import annotations

from typing import NamedTuple


class Extras(NamedTuple):
    """As :func:`hf_kernel_patch.ops.rms_norm.reference.rms_norm` takes them."""

    group_size: int | None = None
    norm_before_gate: bool = True
    activation: str = "silu"
    cast_to_weight: bool = False
    cast_scale: bool = False
