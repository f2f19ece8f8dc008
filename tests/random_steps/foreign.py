"""What somebody else puts in place: wrappers over classes, functions and registry items."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import ModelHook

from hf_kernel_patch.recognition.source import made_by_us
from tests.random_steps.worlds import FAMILIES, PLAIN, REAL, called, plain, real


def scaled(value: Any, factor: float) -> Any:
    """Tensors of a result times the factor; what else is in it as it is."""
    if factor == 1.0:
        return value
    if isinstance(value, torch.Tensor):
        return value * factor if value.is_floating_point() else value
    if type(value) is tuple:
        return tuple(scaled(one, factor) for one in value)
    return value


def wrapper(inner: Callable[..., Any], tag: str, factor: float = 1.0) -> Any:
    """A function that is counted, calls what was there, and scales its result."""

    @functools.wraps(inner)
    def foreign(*args: Any, **kwargs: Any) -> Any:
        called(tag)
        return scaled(inner(*args, **kwargs), factor)

    foreign.foreign = (tag, inner)
    return foreign


class Hook(ModelHook):  # type: ignore[misc]
    """A hook of accelerate that is counted and scales."""

    def __init__(self, tag: str, factor: float = 1.0):
        self.tag, self.factor = tag, factor

    def post_forward(self, module: Any, output: Any) -> Any:
        called(self.tag)
        return scaled(output, self.factor)


class ForwardHook:
    """A forward hook of torch that is counted and scales; it can be pickled and copied."""

    def __init__(self, tag: str, factor: float = 1.0):
        self.tag, self.factor = tag, factor

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        called(self.tag)
        return scaled(output, self.factor)


def chain(value: Any) -> tuple[list[str], Any, bool]:
    """(tags of the user's wrappers, outermost first; what is inside of all; whether ours is)."""
    tags, ours = [], False
    while True:
        if (made := made_by_us(value)) is not None:
            value, ours = made.original, True
        elif (mine := getattr(value, "foreign", None)) is not None:
            tags.append(mine[0])
            value = mine[1]
        else:
            return tags, value, ours


class Place:
    """An attribute that somebody may replace, in both worlds or shared by them."""

    def __init__(self, label: str, owners: dict[str, Any], name: str, items: bool = False):
        self.label, self.owners, self.name, self.items = label, owners, name, items
        self.originals = {world: self.read(world) for world in owners}
        #: A wrapper was put over ours, and may hold it.
        self.over_ours = False
        #: Somebody has written here since ours was last wholly out of force.
        self.written = False

    def read(self, world: str) -> Any:
        owner = self.owners[world]
        return owner[self.name] if self.items else vars(owner)[self.name]

    def write(self, world: str, value: Any) -> None:
        owner = self.owners[world]
        if self.items:
            owner[self.name] = value
        else:
            setattr(owner, self.name, value)


class Foreign:
    """One wrapper over a place, and what it found there."""

    def __init__(self, place: Place, tag: str, factor: float):
        self.place, self.tag = place, tag
        self.before = {world: place.read(world) for world in place.owners}
        self.mine = {w: wrapper(inner, tag, factor) for w, inner in self.before.items()}
        place.over_ours |= chain(self.before[next(iter(self.before))])[2]
        place.written = True
        for world, value in self.mine.items():
            place.write(world, value)

    def on_top(self) -> bool:
        return all(self.place.read(world) is value for world, value in self.mine.items())

    def remove(self) -> None:
        """Put back what it found, whatever stands there now."""
        self.place.written = True
        for world, value in self.before.items():
            self.place.write(world, value)


#: Class attributes, by the end of the class's name; and functions of the modelling module.
METHODS = {
    "RMSNorm": ("forward", "_norm"),
    "MLP": ("forward",),
    "Attention": ("forward",),
    "DecoderLayer": ("forward",),
    "Experts": ("forward",),
    "SparseMoeBlock": ("forward",),
    "ForCausalLM": ("forward",),
    "Model": ("forward",),
}
FUNCTIONS = ("rotate_half", "apply_rotary_pos_emb", "eager_attention_forward", "repeat_kv")


def places() -> dict[str, list[Place]]:
    """Every Place: of classes and functions of the families, and of what all code shares."""
    found: dict[str, list[Place]] = {"method": [], "function": [], "shared": [], "deep": []}
    for family in FAMILIES:
        mine, other = real(family), plain(family)
        prefix = next(n for n in vars(mine) if n.endswith("RMSNorm")).removesuffix("RMSNorm")
        for end, names in METHODS.items():
            kinds = {REAL: vars(mine).get(prefix + end), PLAIN: vars(other).get(prefix + end)}
            for name in names:
                if kinds[REAL] is not None and name in vars(kinds[REAL]):
                    found["method"].append(Place(f"{prefix}{end}.{name}", kinds, name))
        for name in FUNCTIONS:
            if hasattr(mine, name):
                owners = {REAL: mine, PLAIN: other}
                found["function"].append(Place(f"{mine.__name__}.{name}", owners, name))
    from transformers.integrations import sdpa_attention
    from transformers.loss.loss_utils import LOSS_MAPPING
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    mapping = ALL_ATTENTION_FUNCTIONS._global_mapping
    found["shared"] += [
        Place("ALL_ATTENTION_FUNCTIONS[sdpa]", {REAL: mapping}, "sdpa", items=True),
        Place("LOSS_MAPPING[ForCausalLM]", {REAL: LOSS_MAPPING}, "ForCausalLM", items=True),
    ]
    activations = {type(real_activation(family)) for family in FAMILIES}
    found["deep"] += [
        Place(f"{kind.__name__}.forward", {REAL: kind}, "forward")
        for kind in sorted(activations, key=lambda one: one.__name__)
    ]
    functional = torch.nn.functional
    found["deep"] += [
        Place("Linear.forward", {REAL: torch.nn.Linear}, "forward"),
        Place("functional.silu", {REAL: functional}, "silu"),
        Place("functional.cross_entropy", {REAL: functional}, "cross_entropy"),
        Place("sdpa_attention.repeat_kv", {REAL: sdpa_attention}, "repeat_kv"),
    ]
    return found


def real_activation(family: str) -> Any:
    """The activation of the family's MLPs."""
    from transformers.activations import ACT2FN

    return ACT2FN["gelu_pytorch_tanh" if family == "gemma2" else "silu"]
