"""A model and the random numbers are afterwards as they were before."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import devices

if TYPE_CHECKING:
    import torch
    from torch import nn

#: What a module has, and what is put back by itself or is never changed here.
_OWN = ("_parameters", "_buffers", "_modules")


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers, modes, attributes of modules and random numbers are put back at the end.

    Inside, the model begins without gradients. Weights are not copied: nothing here changes them.
    """
    gradients = [(one, one.grad) for one in model.parameters()]
    attributes = [(one, _plain(one), dict(one._buffers)) for one in model.modules()]
    contents = [
        (one, one.detach().clone())
        for _, _, held in attributes
        for one in held.values()
        if one is not None
    ]
    with _random_numbers():
        try:
            for one, _ in gradients:
                one.grad = None
            yield
        finally:
            for one, gradient in gradients:
                one.grad = gradient
            for module, plain, buffers in attributes:
                _put_back(module, plain, buffers)
            for buffer, content in contents:
                _fill(buffer, content)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OWN}


def _put_back(module: nn.Module, plain: dict[str, Any], buffers: dict[str, Any]) -> None:
    """What a forward or ``generate`` has set on a module goes, and what it has replaced is back."""
    own = vars(module)
    for name in [name for name in own if name not in plain and name not in _OWN]:
        del own[name]
    for name, value in plain.items():
        if own.get(name, module) is not value:
            own[name] = value
    module._buffers.clear()
    module._buffers.update(buffers)


def _fill(buffer: torch.Tensor, content: torch.Tensor) -> None:
    import torch

    if not torch.equal(buffer, content):
        with torch.no_grad():
            buffer.copy_(content)


@contextmanager
def _random_numbers() -> Iterator[None]:
    import torch

    current = devices.current()
    kind = current if current in ("cuda", "npu", "xpu") else "cuda"  # those with a state a device
    count = getattr(torch, kind).device_count() if kind == current else 0
    numpy: Any = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(list(range(count)), device_type=kind):
            yield
    finally:
        random.setstate(of_python)
        if numpy:
            numpy.random.set_state(of_numpy)
