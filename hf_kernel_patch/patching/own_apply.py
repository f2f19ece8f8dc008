"""What a kernel's own ``apply`` does to a model, recorded so that it can be undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hf_kernel_patch.kernels import BaseKernel
from hf_kernel_patch.models import SiteSpec
from hf_kernel_patch.patching.ledger import MISSING, Attribute, ClassOf, Item, ledger
from hf_kernel_patch.patching.model_patch import Application, applications, require_model
from hf_kernel_patch.patching.report import Outcome, Row

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def recorded(model: nn.Module, kernel: type[BaseKernel]) -> Iterator[None]:
    """Make what a kernel's own ``apply`` does to a model reversible, and undo it if it raises."""
    require_model(model)
    with ledger.lock:
        before = [(module, type(module), _contents(module)) for module in model.modules()]
        application = Application(model, {kernel.op or kernel.kernel_id: kernel}, explicit=True)
        try:
            yield
        except BaseException:
            _record(application, before)
            application.release()
            raise
        _record(application, before)
        if application.entries:
            applications.append(application)
            site = SiteSpec("", f"{type(model).__name__} (by its own apply)", "")
            application.rows[site] = Row(
                type(model).__name__,
                site.qualname,
                kernel.op,
                kernel.kernel_id,
                Outcome.PATCHED,
                scope="model",
                instances=len({id(ref()) for ref, _ in application.entries}),
            )


#: The mappings of a module, each with a copy.
Contents = list[tuple[dict[str, object], dict[str, object]]]


def _contents(module: nn.Module) -> Contents:
    """The module's own mappings (attributes, parameters, children, hooks), each with a copy."""
    own = vars(module)
    return [(held, dict(held)) for held in (own, *own.values()) if isinstance(held, dict)]


def _record(
    application: Application,
    before: list[tuple[nn.Module, type, Contents]],
) -> None:
    """Enter every change since ``before``."""
    for module, kind, contents in before:
        if type(module) is not kind:
            application.record(ClassOf(module), module, kind)
        for mapping, old in contents:
            for name in [*mapping, *(name for name in old if name not in mapping)]:
                was = old.get(name, MISSING)
                if mapping.get(name, MISSING) is not was:
                    own = mapping is vars(module)
                    slot = Attribute(module, name) if own else Item(mapping, name, old)
                    application.record(slot, module, was)
