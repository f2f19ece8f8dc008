"""The scope of one model: its modules take subclasses, every other model stays what it was."""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from hf_kernel_patch import models
from hf_kernel_patch.errors import KernelPatchWarning
from hf_kernel_patch.models import Target
from hf_kernel_patch.patching.global_patch import ledger
from hf_kernel_patch.patching.ledger import Attribute, ClassOf, Entry, Slot
from hf_kernel_patch.patching.lookup import (
    describe,
    exists_here,
    is_plain_bound,
    locate,
    original_of,
)
from hf_kernel_patch.patching.report import PATCHED, SHADOWED, SKIPPED, PatchReport, Row
from hf_kernel_patch.patching.subclass import forget_scope, rebound, refers_to, subclass
from hf_kernel_patch.recognition import Site, build, forms
from hf_kernel_patch.registry import Kernel, options_of
from hf_kernel_patch.settings import is_rank_zero

logger = logging.getLogger("hf_kernel_patch")
#: Every application in force on some model, oldest first.
applications: list[Application] = []
_OWN_FORWARDS = ("forward", "_old_forward")
Options = tuple[tuple[str, str, Any], ...]  # as ``Settings.options``


class Application:
    """Some kernels on the modules of one model.

    Subclasses and sites are made for each application, so that one model can be given back while
    another stays patched. The modules are held weakly.
    """

    def __init__(
        self,
        kernels: dict[str, Kernel],
        explicit: bool,
        tables: str | tuple[str, ...] = "all",
        options: Options = (),
    ):
        self.kernels = kernels
        self._options = options
        self._tables = models.select(tables)
        self.explicit = explicit
        self.rows: dict[Target, Row] = {}
        self.entries: list[tuple[weakref.ref[Any], Entry]] = []
        self._sites: list[Site] = []
        self._made: dict[tuple[Target, int], Any] = {}
        self._classes: dict[tuple[type, Any], type] = {}

    def apply(self, model: Any) -> None:
        """Patch every module whose class, or the function it calls, a table names."""
        located = [
            (architecture.name, target, locate(target))
            for architecture in self._tables
            if architecture.module in sys.modules
            for target in architecture.targets
            if forms()[target.form].op in self.kernels and exists_here(target)
        ]
        for module in list(model.modules()):
            for architecture, target, found in located:
                if isinstance(found, str):
                    continue
                owner, name, value = found
                if isinstance(owner, type):
                    forward = getattr(type(module), name, None)
                    # A subclass with a forward of its own is not the table's code.
                    if not isinstance(module, owner) or original_of(forward) is not original_of(
                        value
                    ):
                        continue
                    make = self._method(target, forward, owner)
                elif refers_to(module, name, value):
                    make, name = self._rebound(target, found, type(module).forward), "forward"
                else:
                    continue
                self._take((architecture, target), module, name, make)

    def release(self, modules: Iterable[Any] | None = None) -> list[str]:
        """Give modules (all of them by default) back; labels of those a foreign patch holds."""
        chosen = None if modules is None else {id(module) for module in modules}
        kept, blocked = [], []
        for reference, entry in reversed(self.entries):
            owner = reference()
            if owner is not None and chosen is not None and id(owner) not in chosen:
                kept.append((reference, entry))
            elif label := ledger.pop(entry):
                blocked.append(label)
        self.entries = kept[::-1]
        if not self.alive():
            for site in self._sites:
                site.release()
            for made in self._made.values():
                forget_scope(made)
            if self in applications:
                applications.remove(self)
        return blocked

    def alive(self) -> bool:
        """Whether any patched module still lives."""
        return any(reference() is not None for reference, _ in self.entries)

    def adopt(self, twin: Any, kind: type) -> None:
        """Keep a copy of a patched module patched; ``twin`` comes in its original class."""
        self._push(ClassOf(twin), twin, kind)
        for place in _OWN_FORWARDS:
            function: Any = getattr(vars(twin).get(place), "__func__", None)
            if function in self._made.values():
                setattr(twin, place, MethodType(original_of(function), twin))
                self._push(Attribute(twin, place), twin, MethodType(function, twin))

    def record(self, slot: Slot, owner: Any, before: Any) -> None:
        """Enter a change that a kernel's own ``apply`` has made already."""
        after = slot.read()
        slot.write(before)
        self._push(slot, owner, after)

    def _push(self, slot: Slot, owner: Any, value: Any) -> None:
        self.entries.append((weakref.ref(owner), ledger.push(slot, value)))

    def _method(self, target: Target, value: Any, owner: Any) -> Callable[[], Any]:
        """Makes, once for all modules, the replacement of a value; or the reason for none."""

        def make() -> Any:
            key = (target, id(value))
            if key not in self._made:
                adapter = forms()[target.form].adapter_for(original_of(value), owner)
                if isinstance(adapter, str):
                    return adapter
                kernel = self.kernels[forms()[target.form].op]
                options = options_of(kernel, self._options)
                site = Site(target.site, kernel, value, self.explicit, options)
                site.active, site.counters = 1, [self.rows[target].calls]
                self._sites.append(site)
                self._made[key] = build(adapter, site)
            return self._made[key]

        return make

    def _rebound(
        self, target: Target, found: tuple[Any, str, Any], forward: Any
    ) -> Callable[[], Any]:
        """Makes a copy of a forward that finds our function under the original's name."""
        owner, name, value = found

        def make() -> Any:
            made = self._method(target, value, owner)()
            key = (target, id(forward))
            if not isinstance(made, str) and key not in self._made:
                made = rebound(forward, name, made)
                if not isinstance(made, str):
                    self._made[key] = made
            return made if isinstance(made, str) else self._made[key]

        return make

    def _take(
        self, place: tuple[str, Target], module: Any, method: str, make: Callable[[], Any]
    ) -> None:
        """Put a replacement in force on one module and count it in the target's row."""
        architecture, target = place
        kernel = self.kernels[forms()[target.form].op]
        row = self.rows.setdefault(
            target,
            Row(architecture, target.site, kernel.op, kernel.kernel_id, PATCHED, scope="model"),
        )
        if any((target, kernel) == kind.__hf_kernel_patch_served__ for kind in _ours(module)):
            return
        made = make()
        if isinstance(made, str):
            row.outcome, row.reason = SKIPPED, made
            return
        before = original_of(type(module).forward)
        base = type(module)
        if (base, made) not in self._classes:
            self._classes[base, made] = subclass(self, base, method, made, (target, kernel))
        self._push(ClassOf(module), module, self._classes[base, made])
        row.instances = (row.instances or 0) + 1
        row.reason = row.reason or ("" if self.explicit else forms()[target.form].leaves(module))
        if method != "forward":
            return
        own = {name: vars(module)[name] for name in _OWN_FORWARDS if name in vars(module)}
        reached = [name for name in own if is_plain_bound(own[name], module, before)]
        for name in reached:
            self._push(Attribute(module, name, may_vanish=True), module, MethodType(made, module))
        if own and not reached:
            row.outcome = SHADOWED
            owned = describe(next(iter(own.values())))
            row.reason = f"a module owns a forward ({owned}) and is not reached"


def _ours(module: Any) -> list[Any]:
    """Our subclasses in the module's class, the outermost first."""
    return [
        kind for kind in type(module).__mro__ if "__hf_kernel_patch_application__" in vars(kind)
    ]


def patch_model(
    model: Any,
    kernels: dict[str, Kernel],
    explicit: bool,
    tables: str | tuple[str, ...] = "all",
    options: Options = (),
) -> Any:
    """Patch one model with the kernels, by op, and return it; TypeError for no such model."""
    require_model(model)
    with ledger.lock:
        for gone in [one for one in applications if not one.alive()]:
            gone.release()
        application = Application(kernels, explicit, tables, options)
        try:
            application.apply(model)
        except BaseException:
            application.release()
            raise
        if application.entries:
            applications.append(application)
    rows = list(application.rows.values())
    found = {row.op for row in rows if row.outcome != SKIPPED}
    complaints = [f"{row.site}: {row.reason}" for row in rows if row.outcome != PATCHED]
    if explicit:
        complaints += [
            f"{kernel.kernel_id} found no site in this {type(model).__name__}"
            for op, kernel in kernels.items()
            if op not in found
        ]
    if complaints:
        warnings.warn("\n".join(complaints), KernelPatchWarning, stacklevel=4)
    if is_rank_zero():
        logger.info("one %s: %s", type(model).__name__, PatchReport(rows).summary())
    return model


def require_model(model: Any) -> None:
    """TypeError unless ``model`` is, or wraps, a PreTrainedModel."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    parts = getattr(model, "modules", None)
    if base is None or not callable(parts) or isinstance(model, type):
        inside = False
    else:
        inside = any(isinstance(part, base) for part in parts())
    if not inside:
        raise TypeError(
            f"expected a transformers PreTrainedModel, or a module that wraps one, got "
            f"{type(model).__qualname__}"
        )


def release(model: Any = None) -> list[str]:
    """Give one model back, or all; the labels of places that a foreign patch holds."""
    modules = None if model is None else list(model.modules())
    with ledger.lock:
        return [label for app in reversed(applications[:]) for label in app.release(modules)]
