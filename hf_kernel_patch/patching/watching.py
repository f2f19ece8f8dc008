"""What is in force globally, and what comes later: modules being imported, models being built."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

from hf_kernel_patch import models
from hf_kernel_patch.patching.construction import BASE, ModelWatcher
from hf_kernel_patch.patching.imports import ImportWatcher, wait_for_imports
from hf_kernel_patch.patching.ledger import ledger


class Active(Protocol):
    """What this file knows of an activation."""

    def wants(self, module: str) -> bool:
        """Whether it may have something to patch in a module of that name."""

    def imported(self, modules: list[str]) -> Callable[[], None]:
        """Patch imported modules; returns what takes that back."""

    def tell(self) -> None:
        """Log what became of them."""


#: Every activation in force, oldest first.
active: list[Any] = []


def prepare() -> None:
    """What has to be done before an activation is applied, without the ledger's lock.

    What begins to be imported from now on tells when it has ended, and then waits for the lock;
    threads that are importing already are waited for.
    """
    _imports.install()
    wait_for_imports(_wanted)


def begin(activation: Active) -> None:
    """An activation is in force."""
    active.append(activation)
    _models.install()


def end(activation: Active) -> None:
    """An activation ends, or could not begin."""
    if activation in active:
        active.remove(activation)
    if not active:
        _imports.remove()
        _models.remove()


def _wanted(module: str) -> bool:
    return (
        module == BASE
        or models.is_modelling(module)
        or any(architecture.module == module for architecture in models.architectures().values())
    )


def _imported(module: ModuleType) -> None:
    """A module has run. If a strict patch refuses it, its import fails and it is not patched."""
    with ledger.lock:
        if module.__name__ == BASE:  # before which no model could be watched
            if active:
                _models.install()
            return
        done: list[Callable[[], None]] = []
        try:
            for activation in list(active):
                if activation.wants(module.__name__):
                    done.append(activation.imported([module.__name__]))
        except BaseException:
            for take_back in reversed(done):
                take_back()
            raise
    _tell()


def _constructed(modules: list[str]) -> None:
    """Models of a class that was not seen before are about to be built."""
    with ledger.lock:
        for activation in list(active):
            activation.constructed(modules)
    _tell()


def _tell() -> None:
    """Without the lock: a handler of the program may do anything."""
    for activation in list(active):
        activation.tell()


_imports = ImportWatcher(_wanted, _imported)
_models = ModelWatcher(_constructed)
