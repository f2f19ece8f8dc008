"""The scope of one model: its modules take subclasses, every other model stays what it was."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import models
from hf_kernel_patch.errors import cut, listed, shown, warn
from hf_kernel_patch.kernels import Kernel, provide
from hf_kernel_patch.measuring.measurement import Measurement
from hf_kernel_patch.models import SiteSpec
from hf_kernel_patch.patching import log
from hf_kernel_patch.patching.bisection import tell_patched
from hf_kernel_patch.patching.construction import modules_of
from hf_kernel_patch.patching.exclusion import Exclusion
from hf_kernel_patch.patching.ledger import Entry, Slot, ledger, undo_all
from hf_kernel_patch.patching.lookup import calls_by_name, exists_here, locate
from hf_kernel_patch.patching.modules import Module, Wish, module_patch
from hf_kernel_patch.patching.report import Outcome, PatchReport, Row
from hf_kernel_patch.patching.subclass import root_of
from hf_kernel_patch.recognition import known, request, why_not
from hf_kernel_patch.recognition.composing import Located, difference, source_hash
from hf_kernel_patch.recognition.source import innermost, original_of
from hf_kernel_patch.registry import options_of

if TYPE_CHECKING:
    from torch import nn

#: Every application in force on some model, oldest first.
applications: list[Application] = []
Options = tuple[tuple[str, str, object], ...]  # as ``Settings.options``


class Application:
    """Some kernels on the modules of one model, which it holds weakly."""

    def __init__(
        self,
        model: nn.Module,
        kernels: dict[str, Kernel],
        explicit: bool,
        tables: str | tuple[str, ...] = "all",
        options: Options = (),
        exclusion: Exclusion | None = None,
        measure: Measurement | None = None,
    ):
        self.kernels = kernels
        self.measure = measure
        self._exclusion = exclusion or Exclusion()
        self._options = options
        self._selection = models.select(tables)
        self.explicit = explicit
        self.rows: dict[SiteSpec, Row] = {}
        #: The rows of sites that are excluded, and the names of all sites of the model.
        self.excluded: set[SiteSpec] = set()
        self._sites: set[str] = set()
        #: Why the original runs from the beginning, by site.
        self._fallbacks: dict[SiteSpec, str] = {}
        self.modules: list[Module] = []
        self.model = weakref.ref(model)
        if measure is not None:
            weakref.finalize(model, measure.end).atexit = False
        #: What a kernel's own ``apply`` has changed.
        self.entries: list[tuple[weakref.ref[object], Entry]] = []

    def apply(self) -> None:
        """Patch every module whose class, or the function it calls, a table names."""
        model: Any = self.model()
        located = [
            (architecture, spec, found)
            for architecture, spec in [*self._in_tables(), *self._discovered(model)]
            if self._exclusion.patterns or known()[spec.code].op in self.kernels
            if not isinstance(found := locate(spec), str)
        ]
        for module in list(model.modules()):
            for architecture, spec, (owner, name, value) in located:
                function = original_of(value)
                if isinstance(owner, type):
                    # A subclass with a forward of its own is not the table's code.
                    if isinstance(module, owner) and _runs(module, name, function):
                        self._take((architecture, spec), module, name, None)
                elif calls_by_name(module, name, function):
                    self._take((architecture, spec), module, "forward", (owner, name, function))
        self.look()

    def _in_tables(self) -> list[tuple[str, SiteSpec]]:
        """(architecture, spec) of the tables, as far as their modules are imported."""
        return [
            (table.name, spec)
            for table in self._selection.tables
            if table.module in sys.modules
            for spec in table.sites
            if exists_here(spec)
        ]

    def _discovered(self, model: nn.Module) -> list[tuple[str, SiteSpec]]:
        """(architecture, spec) of what is found in the modules of the model's own classes."""
        names = modules_of({root_of(type(module)) for module in model.modules()})
        return [
            (models.family_of(name), spec)
            for name in names
            if self._selection.discovers(name)
            for spec in models.discovered(name)
        ]

    def _row(self, architecture: str, spec: SiteSpec, kernel: Kernel) -> Row:
        """The row of a site, which is made at its first module."""
        row = Row(architecture, spec.name, kernel.op, kernel.kernel_id, Outcome.PATCHED)
        row.scope = "model"
        if self.measure is not None:
            row._measured = partial(self.measure.text, row.site, row.op)
        return self.rows.setdefault(spec, row)

    def unmatched(self) -> list[str]:
        """A complaint of each pattern to exclude that no site of the model matches."""
        return self._exclusion.complaints(self._sites, self._selection)

    def look(self) -> None:
        """Make the rows say what is true now."""
        for spec, row in self.rows.items():
            if row.outcome in (Outcome.PATCHED, Outcome.SHADOWED):
                row.outcome, row.reason = Outcome.PATCHED, self._fallbacks.get(spec, "")
        found: dict[int, list[tuple[Row, Outcome, str]]] = {}
        for one in self.modules:
            for wish in one.wishes if one.module is not None else ():
                if wish.application is self and wish.row.outcome == Outcome.PATCHED:
                    state = one.state(wish, wish.row.reason)
                    found.setdefault(id(wish.row), []).append((wish.row, *state))
        for states in found.values():
            shadowed = [state for state in states if state[1] == Outcome.SHADOWED]
            row, row.outcome, row.reason = (shadowed or sorted(states, key=lambda s: not s[2]))[0]
            if 0 < len(shadowed) < len(states):
                row.reason = f"of {len(states)} modules {len(shadowed)}: {row.reason}"

    def release(self, model: nn.Module | None = None) -> list[str]:
        """Give the modules of a model (all by default) back; labels of what a foreign patch holds.

        Those that the model shares with the one that was patched here stay patched for that one.
        """
        chosen = None if model is None else _ids(model) - self._elsewhere(model)
        kept, blocked = [], []
        for reference, entry in reversed(self.entries):
            owner = reference()
            if owner is not None and chosen is not None and id(owner) not in chosen:
                kept.append((reference, entry))
            elif label := ledger.pop(entry):
                blocked.append(label)
        self.entries = kept[::-1]
        ended = [
            one
            for one in reversed(self.modules)
            if chosen is None or one.module is None or id(one.module) in chosen
        ]
        self.modules = [one for one in self.modules if one not in ended]
        if not self.alive() and self in applications:
            applications.remove(self)
        if not self.alive() and self.measure is not None:
            self.measure.end()
        return blocked + undo_all(partial(self._let_go, one) for one in ended)

    def _let_go(self, one: Module) -> list[str]:
        return one.remove([wish for wish in one.wishes if wish.application is self])

    def _elsewhere(self, model: nn.Module) -> set[int]:
        """The modules of the model that was patched, where it and ``model`` are two models."""
        patched: Any = self.model()
        if patched is None or id(patched) in _ids(model) or id(model) in _ids(patched):
            return set()
        return _ids(patched)

    def alive(self) -> bool:
        """Whether any patched module still lives."""
        patched = any(one.module is not None for one in self.modules)
        return patched or any(reference() is not None for reference, _ in self.entries)

    def holds(self) -> list[nn.Module]:
        """The modules that it patches, as far as they still live."""
        found = [*(one.module for one in self.modules), *(ref() for ref, _ in self.entries)]
        return [module for module in found if module is not None]

    def record(self, slot: Slot, owner: object, before: object) -> None:
        """Enter a change that a kernel's own ``apply`` has made already."""
        after = slot.read()
        slot.write(before)
        self.entries.append((weakref.ref(owner), ledger.push(slot, after)))

    def _take(
        self, site: tuple[str, SiteSpec], module: nn.Module, method: str, called: Located | None
    ) -> None:
        """Put a kernel in force on one module and count it in the site's row."""
        architecture, spec = site
        sites = [spec, *([_caller(module, spec)] if called else ())]
        self._sites |= {one.name for one in sites}
        kernel = self.kernels.get(known()[spec.code].op)
        if kernel is None:
            return
        for one in sites:
            if excluded := self._exclusion.why(one.name):
                row = self._row(architecture, one, kernel)
                row.outcome, row.reason = Outcome.SKIPPED, excluded
                self.excluded.add(one)
                return
        row = self._row(architecture, spec, kernel)
        options = options_of(kernel, self._options)
        measured = self.measure is not None
        asked = request(spec.code, kernel, self.explicit, options, called, measured)
        patch = module_patch(module)
        if patch.asks(method, asked, self):
            return
        if reason := spec.near or why_not(patch.original(method), patch.root, asked):
            row.outcome, row.reason = Outcome.SKIPPED, reason
            return
        patch.add(Wish(method, asked, row, self))
        tell_patched(row.site)
        if patch not in self.modules:
            self.modules.append(patch)
        row.code, row.original = spec.code, source_hash(patch.original(method))
        row._diff = partial(_diff, weakref.ref(patch), method)
        row.instances = (row.instances or 0) + 1
        if not self.explicit and not self._fallbacks.get(spec):
            self._fallbacks[spec] = known()[spec.code].why_fallback(module)


def _caller(module: nn.Module, spec: SiteSpec) -> SiteSpec:
    """The module's forward, which is rewritten where it calls the function of a site."""
    kind = root_of(type(module))
    return replace(spec, module=kind.__module__, qualname=f"{kind.__qualname__}.forward")


def _diff(reference: weakref.ref[Module], method: str) -> str:
    patch = reference()
    made = None if patch is None else patch.composed.get(method)
    return "" if made is None else difference(made)


def _ids(model: nn.Module) -> set[int]:
    return {id(module) for module in model.modules()}


def _runs(module: nn.Module, name: str, function: object) -> bool:
    """Whether the module's class runs a function, in whatever wrappers of transformers."""
    held = getattr(type(module), name, None)
    return held is not None and innermost(held) is innermost(function)


def patch_model(
    model: nn.Module,
    kernels: dict[str, Kernel],
    explicit: bool,
    tables: str | tuple[str, ...] = "all",
    options: Options = (),
    exclusion: Exclusion | None = None,
    measure: Measurement | None = None,
) -> Any:
    """Patch one model with the kernels, by op, and return it; TypeError for no such model."""
    require_model(model)
    with ledger.lock:
        for gone in [one for one in applications if not one.alive()]:
            gone.release()
        application = Application(model, kernels, explicit, tables, options, exclusion, measure)
        try:
            application.apply()
        except BaseException:
            application.release()
            raise
        if application.alive():
            applications.append(application)
    rows = list(application.rows.values())
    excluded = application.excluded
    found = {
        row.op
        for spec, row in application.rows.items()
        if row.outcome != Outcome.SKIPPED or spec in excluded
    }
    complaints = [
        f"{row.site}: {row.reason}"
        for spec, row in application.rows.items()
        if row.outcome != Outcome.PATCHED and not spec.near and spec not in excluded
    ]
    if explicit:
        complaints += [
            f"{kernel.kernel_id} found no site in this {type(model).__name__}"
            for op, kernel in kernels.items()
            if op not in found
        ]
    complaints += application.unmatched()
    if complaints:
        warn(listed(complaints, "\n"))
    log.tell("one %s: %s", type(model).__name__, PatchReport(rows).summary())
    return model


provide(patch_model)


def require_model(model: object) -> None:
    """TypeError unless ``model`` is, or wraps, a PreTrainedModel."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    parts = getattr(model, "modules", None)
    if base is None or not callable(parts) or isinstance(model, type):
        inside = False
    else:
        inside = any(isinstance(part, base) for part in parts())
    if not inside:
        named = f"the class {cut(model.__qualname__)}" if isinstance(model, type) else ""
        what = shown(model) if isinstance(model, str) else cut(type(model).__qualname__)
        raise TypeError(
            "expected a transformers PreTrainedModel, or a module that wraps one, got "
            f"{named or what}"
        )


def release(model: nn.Module | None = None) -> list[str]:
    """Give one model back, or all; the labels of places that a foreign patch holds."""
    with ledger.lock:
        return undo_all(partial(app.release, model) for app in reversed(applications[:]))
