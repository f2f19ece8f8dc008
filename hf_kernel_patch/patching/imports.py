"""Being told of each modelling module that is imported: by whomever, the first time or anew."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class ImportWatcher:
    """A finder on ``sys.meta_path`` that finds nothing itself, and tells when a module has run.

    Args:
        wants: whether a module of that name is of interest.
        imported: is called with the module, in the thread that imports it, before anybody else
            gets it; an exception lets the import fail.
    """

    def __init__(self, wants: Callable[[str], bool], imported: Callable[[Any], None]):
        self._wants, self._imported = wants, imported
        self._busy = threading.local()

    def install(self) -> None:
        """Begin; doing it twice is fine."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """End; doing it twice is fine."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of the finders behind, with a loader that tells."""
        # Finders such as wrapt's ask all finders again.
        if name == getattr(self._busy, "name", None) or not self._wants(name):
            return None
        before, self._busy.name = getattr(self._busy, "name", None), name
        try:
            behind = [finder for finder in list(sys.meta_path) if finder is not self]
            specs = (finder.find_spec(name, path, target) for finder in behind)
            spec: Any = next((one for one in specs if one is not None), None)
        finally:
            self._busy.name = before
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self._imported)
        return spec


class _Loader:
    """A module's loader until the module runs, which then sees the loader itself."""

    def __init__(self, loader: Any, imported: Callable[[Any], None]):
        self._loader, self._imported = loader, imported

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: nn.Module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._imported(module)


def is_imported(module: str) -> bool:
    """Whether a module has been imported, and wholly."""
    return module in sys.modules and not _is_initializing(module)


def wait_for_imports(wants: Callable[[str], bool]) -> None:
    """Let other threads finish the modules that they are importing right now.

    Nobody may wait for locks of the caller's meanwhile.
    """
    # Asked in this order: to look at a module that is loaded at its first use would load it.
    for name in [one for one in list(sys.modules) if wants(one) and _is_initializing(one)]:
        with suppress(Exception):  # which is raised in the thread that imports it
            importlib.import_module(name)


def _is_initializing(module: str) -> bool:
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
