"""Device tensors seen from the host: the simulated device's memory is the host's own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch


def is_on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def alias(value: Any) -> Any:
    """A CPU tensor over the memory of an npu tensor, with its shape, strides and dtype.

    Valid while the npu tensor lives. Anything else is returned as it is.
    """
    if not is_on_device(value):
        return value
    storage = value.untyped_storage()
    size = storage.nbytes()
    if size == 0:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    view = torch.empty(0, dtype=value.dtype)
    return view.set_(whole, value.storage_offset(), value.size(), value.stride())


def to_device(value: Any) -> Any:
    """A new npu tensor with the values, shape and strides of a CPU tensor; else as it is."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="npu")
    alias(made).copy_(value)
    return made


def convert(value: Any, function: Callable[[Any], Any]) -> Any:
    """``value`` with ``function`` applied to every leaf of its lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return type(value)(convert(item, function) for item in value)
    if isinstance(value, dict):
        return {name: convert(item, function) for name, item in value.items()}
    return function(value)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of ``value``, in order."""
    found: list[torch.Tensor] = []
    convert(value, lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None)
    return found
