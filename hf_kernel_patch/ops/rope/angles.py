"""How far cos and sin go, for operators that document a range of them."""

from __future__ import annotations

import math
from typing import NamedTuple
from weakref import ref

import torch


class _Seen(NamedTuple):
    cos: ref[torch.Tensor]
    sin: ref[torch.Tensor]
    versions: tuple[int, int]
    scale: float


#: id of cos -> what is known of it and its sin, while it lives.
_seen: dict[int, _Seen] = {}


def scale_of(cos: torch.Tensor, sin: torch.Tensor) -> float | None:
    """The smallest power of two, 1 at least, by which cos and sin divided are within [-1, 1].

    More than 1 for scaled angles, as YaRN's and LongRoPE's attention factor makes them. A power
    of two, as dividing by it rounds nothing. It is inf where cos or sin is not finite.

    Waits for the device at the first call with a cos and sin, which the layers of a model share.
    None where that is not allowed, while a graph is captured.
    """
    key, versions = id(cos), (_version(cos), _version(sin))
    seen = _seen.get(key)
    if seen and seen.cos() is cos and seen.sin() is sin and seen.versions == versions:
        return seen.scale
    module = torch.get_device_module(cos.device)
    capturing = getattr(module, "is_current_stream_capturing", None)
    if capturing is not None and capturing():
        return None
    largest = float(torch.maximum(*(x.detach().abs().amax().float() for x in (cos, sin))))
    power = math.ceil(math.log2(largest)) if 1.0 < largest < math.inf else 0
    scale = 2.0**power if math.isfinite(largest) else math.inf
    _seen[key] = _Seen(ref(cos, lambda _: _seen.pop(key, None)), ref(sin), versions, scale)
    return scale


def _version(tensor: torch.Tensor) -> int:
    """Counts what was written into a tensor; tensors of inference mode have no count."""
    return -1 if tensor.is_inference() else tensor._version
