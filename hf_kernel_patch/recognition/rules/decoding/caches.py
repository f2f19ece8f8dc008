"""The caches of transformers whose place memory of ours may take."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.rules.decoding.call import CannotCapture

if TYPE_CHECKING:
    import torch

#: The layers of a cache that memory may take the place of.
_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer"}


def filled(layer: Any) -> bool:
    """Whether a layer of a cache holds tokens."""
    keys = layer.keys
    return keys is not None and keys.numel() > 0


@cache
def _class() -> type:
    from transformers import DynamicCache

    return DynamicCache


def check_class(cache: Any) -> None:
    """Raises CannotCapture for anything else than a DynamicCache."""
    if cache is None:
        raise CannotCapture("there is no cache")
    if type(cache) is not _class():
        raise CannotCapture(f"the cache is a {type(cache).__name__}")


def length_of(cache: Any, device: torch.device, batch: int) -> int:
    """How many tokens a cache has seen; raises CannotCapture where its tokens have no graph."""
    import torch

    check_class(cache)
    if not isinstance(layers := getattr(cache, "layers", None), list):
        raise CannotCapture("the caches of this transformers have no layers")
    if getattr(cache, "offloading", False):
        raise CannotCapture("the cache is offloaded")
    _check_methods(cache)
    lengths = set()
    for layer in layers:
        _check_methods(layer)
        if type(layer).__name__ not in _LAYERS or type(layer).__module__ != _class().__module__:
            raise CannotCapture(f"the cache has a {type(layer).__name__}")
        if getattr(layer, "record_past", False):
            raise CannotCapture("the cache records the past of its sliding windows")
        if not filled(layer):
            continue
        for tensor in (layer.keys, layer.values):
            if type(tensor) is not torch.Tensor or tensor.dim() != 4 or tensor.requires_grad:
                raise CannotCapture("the cache holds no plain tensors of four dimensions")
            if tensor.device != device or tensor.shape[0] != batch:
                raise CannotCapture("the cache is on another device, or for another batch")
            if not tensor.dtype.is_floating_point or tensor.shape[2] != layer.keys.shape[2]:
                raise CannotCapture("keys and values of the cache do not agree")
        sliding = layer.is_sliding
        lengths.add(layer.cumulative_length if sliding else layer.keys.shape[2])
        if sliding and layer.keys.shape[2] < min(layer.cumulative_length, layer.sliding_window - 1):
            raise CannotCapture("a sliding window of the cache was cropped")
    if len(lengths) != 1:
        raise CannotCapture("the cache is empty" if not lengths else "its layers differ in length")
    return int(lengths.pop())


def _check_methods(owner: Any) -> None:
    """Raises CannotCapture for a cache or a layer that has methods of its own."""
    for name, value in vars(owner).items():
        if callable(value) and callable(getattr(type(owner), name, None)):
            raise CannotCapture(f"{name} of the cache was replaced")


def methods_of_caches() -> list[tuple[Any, str, Any]]:
    """(what a class holds, name, function) of each method by which caches take tokens.

    Raises CannotCapture where one of them is not that of transformers.
    """
    from transformers import cache_utils

    found = []
    for name in ("Cache", "DynamicCache", *_LAYERS):
        held = vars(getattr(cache_utils, name, object))
        if "update" in held:
            if getattr(held["update"], "__module__", "") != cache_utils.__name__:
                raise CannotCapture(f"{name}.update was replaced")
            found.append((held, "update", held["update"]))
    return found
