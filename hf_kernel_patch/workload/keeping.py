"""The modules of a model are afterwards as they were before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

#: What a module has, and what is put back by itself or is never changed here.
_OWN = ("_parameters", "_buffers", "_modules")


@contextmanager
def modules_kept(model: nn.Module) -> Iterator[None]:
    """Buffers, modes and all other attributes of modules are put back at the end."""
    attributes = [(one, _plain(one), dict(one._buffers)) for one in model.modules()]
    contents = [
        (one, one.detach().clone())
        for _, _, held in attributes
        for one in held.values()
        if one is not None and not one.is_meta
    ]
    try:
        yield
    finally:
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
