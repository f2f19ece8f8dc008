"""decode_attention: all backends against transformers' sdpa, and eager of Gemma2 and GPT-OSS."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from hf_kernel_patch.ops.decode_attention.memory import LayerCache
from tests.support.ops.checks import BF16, F16, F32, SHORT, Case, draw
from tests.support.tiny import modelling


@dataclass(frozen=True)
class Call:
    """One call, by its sizes.

    Attributes:
        heads, group: of keys and values, and how many of the query read each.
        slot: where the new token goes; its position is ``start`` after that.
        mask: a name of ``MASKS``.
        new: whether there are key and value, or another layer has written them.
        layout: of the query, the key and the value.
    """

    slot: int
    batch: int = 2
    heads: int = 2
    group: int = 2
    key_dim: int = 16
    value_dim: int = 16
    capacity: int = 200
    size: int = 200
    start: int = 0
    dtype: torch.dtype = F32
    mask: str = ""
    new: bool = True
    layout: str = "contiguous"
    scaling: float | None = None
    softcap: float | None = None
    sinks: bool = False

    def layer(self, device: str, seed: int = 0) -> LayerCache:
        """A cache with tokens in all slots before the new one, and NaN in all others."""
        tensors = []
        for dim in (self.key_dim, self.value_dim):
            shape = (self.batch, self.heads, self.capacity, dim)
            tensor = draw(shape, self.dtype, seed=seed + dim, grad=False, device=device)
            tensor[:, :, self.slot + (not self.new) :] = torch.nan
            tensors.append(tensor)
        return LayerCache(tensors[0], tensors[1], self.start)

    def tokens(self, device: str, seed: int = 10) -> list[torch.Tensor | None]:
        """Query, key and value of the new token."""
        sizes = (
            (self.heads * self.group, self.key_dim),
            (self.heads, self.key_dim),
            (self.heads, self.value_dim),
        )
        drawn: list[torch.Tensor | None] = []
        for i, (heads, dim) in enumerate(sizes):
            if i and not self.new:
                drawn.append(None)
                continue
            options = {"seed": seed + i, "layout": self.layout, "grad": False, "device": device}
            drawn.append(draw((self.batch, heads, 1, dim), self.dtype, **options))
        return drawn

    def allowed(self, device: str) -> torch.Tensor | None:
        """The mask."""
        if not self.mask:
            return None
        j = torch.arange(self.size)[None]
        first = torch.arange(self.batch)[:, None] * 70
        random = torch.rand(self.batch, self.size, generator=torch.Generator().manual_seed(3))
        found = {
            "left padding": (j >= first) | (j == self.slot),
            "window": (j > self.slot - 40) & (j <= self.slot),
            "random": (random < 0.2) | (j == self.slot),
            "old": (j < 3) | ((j > 90) & (j < 96)),  # not the new token
            "nothing": (j >= 0) & (first > 0),  # for the first sequence
        }[self.mask]
        return found.contiguous().to(device)

    def arguments(self, device: str) -> tuple[Any, ...]:
        sinks = draw((self.heads * self.group,), self.dtype, seed=7, grad=False, device=device)
        position = torch.tensor([self.slot + self.start], device=device)
        return (
            *(*self.tokens(device), self.layer(device), position, self.size),
            *(self.allowed(device), self.scaling, self.softcap, sinks if self.sinks else None),
        )


class CacheCase(Case):
    """A case whose reference runs on the CPU, to which its cache has to come as well."""

    def reference(self, *arguments: Any, **options: Any) -> Any:
        query, key, value, layer, *rest = arguments
        there = query.device
        layer = LayerCache(layer.keys.to(there), layer.values.to(there), layer.start)
        return super().reference(query, key, value, layer, *rest, **options)


def original(
    query: Any,
    key: Any,
    value: Any,
    layer: LayerCache,
    position: Any,
    size: int,
    mask: Any,
    scaling: float | None,
    softcap: float | None,
    sinks: Any,
) -> Any:
    """What transformers computes once the cache has the token."""
    length = int(position) - layer.start + 1
    keys, values = layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone()
    if key is not None:
        keys[:, :, -1:], values[:, :, -1:] = key, value
    module = SimpleNamespace(
        num_key_value_groups=query.shape[1] // keys.shape[1],
        training=False,
        is_causal=True,
        sinks=sinks,
    )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    allowed = None if mask is None else mask[:, None, None, :length]
    if allowed is not None:  # what sdpa makes of a NaN is nobody's concern
        hidden = ~allowed[:, 0, 0, :, None].expand(len(keys), -1, -1)[:, None]
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    if softcap is None and sinks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, keys, values, allowed, scaling=scaling)[0]
    if allowed is not None:
        least = torch.finfo(query.dtype).min
        allowed = torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, least)
    options = {"scaling": scaling, "dropout": 0.0}
    if sinks is not None:
        eager = modelling("gpt_oss").eager_attention_forward
    else:
        eager = modelling("gemma2").eager_attention_forward
        options["softcap"] = softcap
    return eager(module, query, keys, values, allowed, **options)[0]


def case(name: str, slot: int, **sizes: Any) -> Case:
    call = Call(slot, **sizes)
    label = f"{name}-{SHORT[call.dtype]}"
    inputs = lambda device: (call.arguments(device), {})  # noqa: E731
    return CacheCase(label, "decode_attention", inputs, original)


CASES: list[Case] = [
    case(name, dtype=dtype, **options)
    for dtype in (F32, BF16, F16)
    for name, options in {
        "first token": {"slot": 0},
        "heads of their own": {"slot": 130, "group": 1},
        "groups of 3": {"slot": 130, "group": 3, "batch": 1},
        "groups of 8": {"slot": 64, "group": 8, "heads": 1},
        "one key head": {"slot": 63, "group": 17, "heads": 1, "batch": 1},
        "head dim 80": {"slot": 99, "key_dim": 80, "value_dim": 80},
        "odd dims": {"slot": 99, "key_dim": 33, "value_dim": 21, "layout": "half"},
        "unlike dims": {"slot": 150, "key_dim": 96, "value_dim": 64, "heads": 1},
        "head dim 512": {"slot": 40, "key_dim": 512, "value_dim": 512, "heads": 1, "batch": 1},
        "strides": {"slot": 130, "layout": "heads"},
        "sliced": {"slot": 130, "layout": "sliced"},
        "transposed": {"slot": 130, "layout": "transposed"},
        "small size": {"slot": 99, "size": 100},
        "small capacity": {"slot": 99, "capacity": 100, "size": 700},
        "old tokens dropped": {"slot": 90, "start": 1000},
        "scaling": {"slot": 130, "scaling": 0.3},
        "keys of another layer": {"slot": 128, "new": False},
        "left padding": {"slot": 190, "mask": "left padding", "batch": 3},
        "window": {"slot": 190, "mask": "window"},
        "random mask": {"slot": 190, "mask": "random", "new": False},
        "softcap": {"slot": 130, "softcap": 5.0},
        "softcap and mask": {"slot": 130, "softcap": 2.0, "mask": "window"},
        "sinks": {"slot": 130, "sinks": True},
        "sinks and mask": {"slot": 130, "sinks": True, "mask": "random", "batch": 1},
        "one block and sinks": {"slot": 3, "sinks": True, "batch": 5},
    }.items()
]
#: It has no backward.
PLAIN: list[Case] = []
