"""The global scope: one request in force, over every class and function that its tables name."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from hf_kernel_patch import models
from hf_kernel_patch.errors import ForeignPatchError, KernelPatchError, KernelPatchWarning
from hf_kernel_patch.models import Architecture, Target
from hf_kernel_patch.patching.ledger import Attribute
from hf_kernel_patch.patching.lookup import (
    describe,
    exists_here,
    globals_holding,
    is_imported,
    is_plain_bound,
    locate,
    owner_of,
    shadows,
    wrapping_subclasses,
)
from hf_kernel_patch.patching.records import (
    Holder,
    Record,
    bound_to,
    describe_source,
    ledger,
    record_of,
)
from hf_kernel_patch.patching.report import PATCHED, PENDING, SHADOWED, SKIPPED, Row
from hf_kernel_patch.recognition import Request, known, request, why_not
from hf_kernel_patch.recognition.source import original_of
from hf_kernel_patch.registry import Kernel, has_own_apply, options_of
from hf_kernel_patch.settings import Settings

logger = logging.getLogger("hf_kernel_patch")
#: Every activation in force, oldest first; import hooks consult it.
active: list[Activation] = []
_hooked: set[str] = set()


class Activation:
    """What one call of ``patch_transformers`` or one ``patched`` block put in force."""

    def __init__(self, settings: Settings, kernels: dict[str, Kernel], explicit: bool):
        self.settings = settings
        self.kernels = kernels
        self.explicit = explicit
        self.rows: list[Row] = []
        self._held: list[tuple[Record, Holder]] = []
        self._waiting: dict[str, list[tuple[Target, Row]]] = {}
        self._complaints: list[str] = []
        self._ops: set[str] = set()

    def apply(self) -> None:
        """Patch what is imported and wait for the rest; on any failure nothing is left behind."""
        with ledger.lock:
            try:
                for architecture in models.select(self.settings.models):
                    self._consider(architecture)
                self._cover([name for name in self._waiting if is_imported(name)])
                self._check_kernels()
                self._speak()
                active.append(self)
                for module in list(self._waiting):
                    _hook(module)
            except BaseException:
                self.undo()
                raise

    def undo(self) -> list[str]:
        """Take everything back; the labels of places that a foreign patch keeps from it."""
        with ledger.lock:
            if self in active:
                active.remove(self)
            self._waiting.clear()
            return self._take_back(0)

    def imported(self, module: str) -> Callable[[], None]:
        """Patch a modelling module that has just been imported; returns what takes that back."""
        waiting, held = dict(self._waiting), len(self._held)

        def take_back() -> None:
            self._waiting, self._complaints = waiting, []
            self._take_back(held)
            for _, row in waiting.get(module, []):
                row.outcome, row.reason = PENDING, ""

        try:
            self._cover([module])
            self._speak()
        except BaseException:
            take_back()
            raise
        return take_back

    def _take_back(self, since: int) -> list[str]:
        """End all requests but the first ``since``, newest first."""
        blocked: list[str] = []
        for record, holder in reversed(self._held[since:]):
            blocked += record.remove(holder)
        del self._held[since:]
        return blocked

    def _consider(self, architecture: Architecture) -> None:
        """A row for every target of the table that a chosen kernel serves."""
        for target in architecture.targets:
            kernel = self.kernels.get(known()[target.code].op)
            if kernel is not None and exists_here(target):
                row = Row(architecture.name, target.site, kernel.op, kernel.kernel_id, PENDING)
                self.rows.append(row)
                self._waiting.setdefault(target.module, []).append((target, row))
                if not known()[target.code].unserved:
                    self._ops.add(kernel.op)

    def _cover(self, modules: list[str]) -> None:
        """Patch the waiting targets of modules that are imported."""
        functions: dict[int, Record] = {}
        classes: dict[type, tuple[Record, Row]] = {}
        for target, row in [pair for name in modules for pair in self._waiting.pop(name, [])]:
            found = locate(target)
            reason = found if isinstance(found, str) else self._take(target, row, *found)
            if reason or isinstance(found, str):
                row.outcome, row.reason = SKIPPED, reason or ""
                if not known()[target.code].unserved:
                    self._complaints.append(f"{row.site} is not patched by {row.kernel}: {reason}")
                continue
            owner, name, value = found
            row.outcome = PATCHED
            record = record_of(value, owner)
            if not isinstance(owner, type):
                functions |= {id(value): record, id(record.original): record}
            elif name == "forward":
                classes[owner] = record, row
        if functions:
            for module, name, held in globals_holding(functions):
                functions[id(held)].hold(Attribute(module, name))
        if classes:
            self._reach_instances(classes)

    def _take(self, target: Target, row: Row, owner: Any, name: str, value: Any) -> str | None:
        """Put a kernel in force on a located target; the reason where it cannot be."""
        kernel = self.kernels[row.op]
        options = options_of(kernel, self.settings.options)
        asked = request(target.code, kernel, self.explicit, options)
        if reason := why_not(original_of(value), owner, asked):
            return reason
        describe_source(row, asked, value)
        if not isinstance(owner, type):
            self._hold(value, owner, asked, row)
            return None
        for kind in (owner, *wrapping_subclasses(owner, name)):
            self._hold(vars(kind).get(name, value), kind, asked, row, Attribute(kind, name))
        return None

    def _hold(
        self, value: Any, owner: Any, asked: Request, row: Row, slot: Attribute | None = None
    ) -> None:
        record, holder = record_of(value, owner), Holder(asked, row)
        record.add(holder)
        self._held.append((record, holder))
        if slot is not None:
            record.hold(slot)

    def _reach_instances(self, classes: dict[type, tuple[Record, Row]]) -> None:
        """Instances that own a forward bypass their class: reach inside, or report them."""
        unreached: dict[str, tuple[Row, list[Any]]] = {}
        found = self._shadows(classes)
        if not all(reachable for *_, reachable in found):
            # A module that owns a bound forward is a cycle: it may be dead but not collected yet.
            del found
            gc.collect()
            found = self._shadows(classes)
        for module, name, value, reachable in found:
            record, row = classes[owner_of(module, classes)]
            if reachable:
                record.hold(Attribute(module, name, may_vanish=True), bound_to(module))
            elif name == "_old_forward" or "_old_forward" not in vars(module):
                unreached.setdefault(row.site, (row, []))[1].append(value)
        for row, values in unreached.values():
            row.outcome = SHADOWED
            row.reason = (
                f"{len(values)} instances own a forward ({describe(values[0])}) and are not "
                "reached; patch before it is set"
            )
            self._complaints.append(f"{row.site}: {row.reason}")

    def _shadows(self, classes: dict[type, tuple[Record, Row]]) -> list[tuple[Any, str, Any, bool]]:
        """(instance, name, value, whether it can be reached) of forwards that instances own."""
        return [
            (module, name, value, is_plain_bound(value, module, original))
            for module, name, value in shadows([r.function for r, _ in classes.values()], classes)
            for original in [classes[owner_of(module, classes)][0].original]
        ]

    def _check_kernels(self) -> None:
        """Every kernel that was asked for by name has to have found some site."""
        for op, kernel in self.kernels.items():
            if self.explicit and op not in self._ops:
                chosen = self.settings.models
                named = "any architecture" if isinstance(chosen, str) else ", ".join(chosen)
                reason = f"{kernel.kernel_id} found no site in {named}"
                if has_own_apply(kernel):
                    reason += "; it patches one model at a time: use apply_kernel"
                self.rows.append(Row(named, "", op, kernel.kernel_id, SKIPPED, reason))
                self._complaints.append(reason)

    def _speak(self) -> None:
        """Raise the first complaint when strict, else warn of all at once."""
        complaints, self._complaints = self._complaints, []
        if complaints and self.settings.strict:
            raise KernelPatchError(complaints[0])
        if complaints:
            warnings.warn("\n".join(complaints), KernelPatchWarning, stacklevel=4)


def _hook(module: str) -> None:
    """Have wrapt tell us when the module is imported."""
    if module in _hooked:
        return
    import wrapt

    _hooked.add(module)
    wrapt.register_post_import_hook(_imported, module)


def _imported(module: Any) -> None:
    """What wrapt calls. Where a strict patch refuses the module, it is patched by none."""
    name = module.__name__
    _hooked.discard(name)
    with ledger.lock:
        done: list[Callable[[], None]] = []
        try:
            for activation in list(active):
                done.append(activation.imported(name))
        except BaseException:
            for take_back in reversed(done):
                take_back()
            # The import fails with this error; the next try has to meet the hook again.
            sys.modules.pop(name, None)
            _hook(name)
            raise


def raise_if_blocked(blocked: list[str]) -> None:
    """One error that names every place where somebody else's patch stayed."""
    if blocked:
        raise ForeignPatchError(
            "everything else is restored, but somebody patched over these: "
            + "; ".join(dict.fromkeys(blocked))
        )
