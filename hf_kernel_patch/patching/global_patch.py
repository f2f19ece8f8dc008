"""The global scope: one request in force, over every class and function that its tables name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hf_kernel_patch import models
from hf_kernel_patch.errors import KernelPatchError, listed, warn
from hf_kernel_patch.kernels import Kernel
from hf_kernel_patch.measuring.measurement import Measurement
from hf_kernel_patch.models import Architecture, SiteSpec
from hf_kernel_patch.patching import log, watching
from hf_kernel_patch.patching.bisection import tell_patched
from hf_kernel_patch.patching.construction import modules_of_models
from hf_kernel_patch.patching.exclusion import exclusion_of
from hf_kernel_patch.patching.imports import is_imported
from hf_kernel_patch.patching.in_force import (
    Classes,
    bypassed,
    in_front,
    kept_of_earlier,
    state_of,
    why_none,
)
from hf_kernel_patch.patching.ledger import Attribute, ledger, undo_all
from hf_kernel_patch.patching.lookup import (
    exists_here,
    globals_holding,
    is_own_code,
    is_plain_bound,
    locate,
    owner_of,
    wrapping_subclasses,
)
from hf_kernel_patch.patching.records import (
    Holder,
    Record,
    bound_to,
    describe_source,
    record_of,
)
from hf_kernel_patch.patching.report import Outcome, PatchReport, Row
from hf_kernel_patch.recognition import Request, known, request, why_not
from hf_kernel_patch.recognition.source import original_of
from hf_kernel_patch.registry import has_own_apply, options_of
from hf_kernel_patch.settings import Settings


@dataclass(eq=False)
class _Considered:
    """A site, the row that reports it, and whether a table expects it to be there.

    ``excluded`` sites are never patched by this request.
    """

    spec: SiteSpec
    row: Row
    expected: bool
    excluded: bool


class Activation:
    """What one call of ``patch_transformers`` or one ``patched`` block put in force."""

    def __init__(
        self,
        settings: Settings,
        kernels: dict[str, Kernel],
        explicit: bool,
        measure: Measurement | None = None,
    ):
        self.settings = settings
        self._measure = measure
        self.kernels = kernels
        self.explicit = explicit
        self.rows: list[Row] = []
        self._held: list[tuple[Record, Holder]] = []
        self._selection = models.select(settings.models)
        self._exclusion = exclusion_of(settings)
        self._sites: dict[str, list[_Considered]] = {}
        self._looked_at: set[str] = set()
        self._complaints: list[str] = []
        self._ops: set[str] = set()
        self._came: list[Row] = []

    def apply(self) -> None:
        """Patch what is imported and wait for the rest; on any failure nothing is left behind."""
        with ledger.lock:
            try:
                for architecture in self._selection.tables:
                    self._consider(architecture)
                self._cover(self._modules())
                self._check_kernels()
                if self.kernels:
                    self._complaints += self._exclusion.complaints(None, self._selection)
                self._speak()
                if self.kernels:
                    watching.begin(self)
            except BaseException:
                self.undo()
                raise

    def renew(self) -> None:
        """Patch what has come since, or what could not be patched then."""
        with ledger.lock:
            self.imported(self._modules())
        self.tell()

    def tell(self) -> None:
        """Log what became of the sites of modules that have come."""
        came, self._came = self._came, []
        if came:
            names = ", ".join(dict.fromkeys(row.architecture for row in came))
            log.tell("%s: %s", names, PatchReport(came).summary())

    def undo(self) -> list[str]:
        """Take everything back; the labels of sites that a foreign patch keeps from it."""
        with ledger.lock:
            watching.end(self)
            if self._measure is not None:
                self._measure.end()
            self._sites.clear()
            return self._take_back(0)

    def wants(self, module: str) -> bool:
        """Whether it may have something to patch in a module of that name."""
        return module in self._sites or self._selection.discovers(module)

    def constructed(self, modules: list[str]) -> None:
        """Patch what models are being built of, unless their import was noticed."""
        noticed = {name for name in self._looked_at if name.startswith(models.PREFIX)}
        self.imported([name for name in modules if name not in noticed and self.wants(name)])

    def _modules(self) -> list[str]:
        """The imported modules that it patches: of tables, of transformers and of users."""
        if not self.kernels:
            return []
        others = [name for name in list(sys.modules) if models.is_modelling(name)]
        names = dict.fromkeys([*self._sites, *others, *modules_of_models()])
        return [name for name in names if self.wants(name) and is_imported(name)]

    def imported(self, modules: list[str]) -> Callable[[], None]:
        """Patch modelling modules that have just been imported; returns what takes that back."""
        held = len(self._held)
        before = [(row, row.outcome, row.reason) for row in self.rows]

        def take_back() -> None:
            self._complaints, self._came = [], []
            self._take_back(held)
            self.rows[:] = [row for row, _, _ in before]
            for name, sites in self._sites.items():
                self._sites[name] = [site for site in sites if site.row in self.rows]
            for row, outcome, reason in before:
                row.outcome, row.reason = outcome, reason

        try:
            self._cover(modules)
            self._speak()
        except BaseException:
            take_back()
            raise
        known = {id(row): outcome for row, outcome, _ in before}
        self._came += [row for row in self.rows if known.get(id(row)) != row.outcome]
        return take_back

    def _take_back(self, since: int) -> list[str]:
        """End all requests but the first ``since``, newest first."""
        ended = self._held[since:]
        del self._held[since:]
        return undo_all(partial(record.remove, holder) for record, holder in reversed(ended))

    def _consider(self, architecture: Architecture) -> None:
        """A row for every site of the table that a chosen kernel serves."""
        for spec in architecture.sites:
            if exists_here(spec):
                self._add(architecture.name, spec, expected=True)

    def _discover(self, module: str) -> None:
        """A row for what is found in a module without a table, and not in an earlier look."""
        seen = {site.spec.qualname for site in self._sites.get(module, ())}
        for spec in models.discovered(module):
            if spec.qualname not in seen:
                self._add(models.family_of(module), spec, expected=False)

    def _add(self, architecture: str, spec: SiteSpec, expected: bool) -> None:
        kernel = self.kernels.get(known()[spec.code].op)
        if kernel is None:
            return
        row = Row(architecture, spec.name, kernel.op, kernel.kernel_id, Outcome.PENDING)
        if self._measure is not None:
            row._measured = partial(self._measure.text, row.site, row.op)
        if reason := self._exclusion.why(spec.name):
            row.outcome, row.reason = Outcome.SKIPPED, reason
        self.rows.append(row)
        site = _Considered(spec, row, expected, excluded=bool(reason))
        self._sites.setdefault(spec.module, []).append(site)
        if expected:
            self._ops.add(kernel.op)

    def _cover(self, modules: list[str]) -> None:
        """Patch the sites of imported modules that are not patched yet."""
        functions: dict[int, Record] = {}
        classes: Classes = {}
        taken: list[_Considered] = []
        self._looked_at |= set(modules)
        for name in modules:
            if self._selection.discovers(name):
                self._discover(name)
        considered = [site for name in modules for site in self._sites.get(name, [])]
        for site in [one for one in considered if not one.excluded]:
            found, row = site.spec.near or locate(site.spec), site.row
            if not isinstance(found, str):
                if not self._is_new(row, *found):
                    continue
                reason = self._take(site.spec, row, *found)
            else:
                reason = found
            if reason or isinstance(found, str):
                known_already = (row.outcome, row.reason) == (Outcome.SKIPPED, reason)
                row.outcome, row.reason = Outcome.SKIPPED, reason or ""
                if site.expected and not known_already:
                    self._complaints.append(f"{row.site} is not patched by {row.kernel}: {reason}")
                continue
            owner, name, value = found
            row.outcome, row.reason = Outcome.PATCHED, ""
            tell_patched(row.site)
            taken.append(site)
            record = record_of(value, owner)
            if not isinstance(owner, type):
                functions |= dict.fromkeys(record.made_before(), record)
                functions |= {id(value): record, id(record.original): record}
            elif name == "forward":
                classes |= {one.owner: (one, row) for one in self._records(row)}
                classes[owner] = record, row
        if functions:
            for module, name, held in globals_holding(functions):
                if not self._exclusion.why(f"{module.__name__}.{name}"):  # an alias may be
                    functions[id(held)].hold(Attribute(module, name))
        self._look_at(taken, self._reach_instances(classes, taken))
        self._complaints += [f"{p.row.site}: {p.row.reason}" for p in taken if p.row.reason]

    def _is_new(self, row: Row, owner: object, name: str, value: object) -> bool:
        """Whether what stands at a site is not what was patched for this row, as after a reload."""
        held = self._records(row)
        if not any(record.holds(owner, name) for record in held):
            return True
        originals = [id(record.original) for record in held]
        return is_own_code(owner, value) and id(original_of(value)) not in originals

    def _records(self, row: Row) -> list[Record]:
        return [record for record, holder in self._held if holder.row is row]

    def _take(
        self, spec: SiteSpec, row: Row, owner: object, name: str, value: object
    ) -> str | None:
        """Put a kernel in force on a site; the reason where it cannot be."""
        asked = self._asked(spec)
        if reason := why_not(original_of(value), owner, asked):
            return reason
        describe_source(row, asked, value)
        if not isinstance(owner, type):
            self._hold(value, owner, asked, row)
            return None
        for kind in (owner, *wrapping_subclasses(owner, name)):
            self._hold(vars(kind).get(name, value), kind, asked, row, Attribute(kind, name))
        return None

    def _asked(self, spec: SiteSpec) -> Request:
        kernel = self.kernels[known()[spec.code].op]
        options = options_of(kernel, self.settings.options)
        measured = self._measure is not None
        return request(spec.code, kernel, self.explicit, options, measured=measured)

    def _hold(
        self, value: object, owner: object, asked: Request, row: Row, slot: Attribute | None = None
    ) -> None:
        record, holder = record_of(value, owner), Holder(asked, row, measure=self._measure)
        record.add(holder)
        self._held.append((record, holder))
        if slot is not None:
            record.hold(slot, holder=holder)

    def _reach_instances(self, classes: Classes, taken: list[_Considered]) -> bool:
        """Instances that own a forward bypass their class: reach inside of those bound to it.

        Returns whether anything may stand in front of what was taken. The instances are let go of
        here, for some may be dead.
        """
        records = [record for site in taken for record in self._records(site.row)]
        owned, doubtful = in_front(classes, records)
        for module, name, value in owned:
            record, _ = classes[owner_of(module, classes)]
            if is_plain_bound(value, module, record.original):
                record.hold(Attribute(module, name, may_vanish=True), bound_to(module))
        return doubtful

    def look(self) -> None:
        """Make the rows say what is true now."""
        with ledger.lock:
            self._look_at([site for sites in self._sites.values() for site in sites])

    def _look_at(self, sites: list[_Considered], doubtful: bool = True) -> None:
        """Fill the rows; unless ``doubtful``, nothing is known to stand in front of a patch."""
        classes: Classes = {}
        for site in sites:
            if site.excluded or not is_imported(site.spec.module):
                continue
            row, records = site.row, self._records(site.row)
            found = site.spec.near or locate(site.spec)
            if not records:
                row.outcome, row.reason = why_none(row, found, self._asked(site.spec))
                continue
            row.outcome, row.reason = state_of(records, found)
            if (
                row.outcome == Outcome.PATCHED
                and not isinstance(found, str)
                and found[1] == "forward"
            ):
                classes |= {record.owner: (record, row) for record in records}
        if not doubtful:
            return
        kept = kept_of_earlier([record for site in sites for record in self._records(site.row)])
        for site in sites if kept else ():
            why = [kept[id(one)] for one in self._records(site.row) if id(one) in kept]
            if why and site.row.outcome == Outcome.PATCHED:
                site.row.reason = why[0]
        for row, reason in bypassed(classes):
            row.outcome, row.reason = Outcome.SHADOWED, reason

    def _check_kernels(self) -> None:
        """Every kernel that was asked for by name has to have found some site.

        Modules without a table, which may come later, may have code of any op that is known.
        """
        no_others = self._selection.others is not None and not self._selection.others
        sought = set() if no_others else {one.op for one in known().values()}
        for op, kernel in self.kernels.items():
            if self.explicit and op not in self._ops | sought:
                chosen = self.settings.models
                named = "any architecture" if isinstance(chosen, str) else ", ".join(chosen)
                reason = f"{kernel.kernel_id} found no site in {named}"
                if has_own_apply(kernel):
                    reason += "; it patches one model at a time: use apply_kernel"
                self.rows.append(Row(named, "", op, kernel.kernel_id, Outcome.SKIPPED, reason))
                self._complaints.append(reason)

    def _speak(self) -> None:
        """Raise the first complaint when strict, else warn of all at once."""
        complaints, self._complaints = self._complaints, []
        if complaints and self.settings.strict:
            raise KernelPatchError(complaints[0])
        if complaints:
            warn(listed(complaints, "\n"))
