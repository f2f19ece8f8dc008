"""The global scope: one request in force, over every class and function that its tables name."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

from hf_kernel_patch import models
from hf_kernel_patch.errors import ForeignPatchError, KernelPatchError, KernelPatchWarning
from hf_kernel_patch.models import Architecture, Target
from hf_kernel_patch.patching.ledger import Attribute, Entry, Ledger
from hf_kernel_patch.patching.lookup import (
    describe,
    exists_here,
    globals_holding,
    is_imported,
    is_plain_bound,
    locate,
    original_of,
    owner_of,
    shadows,
    wrapping_subclasses,
)
from hf_kernel_patch.patching.report import PATCHED, PENDING, SHADOWED, SKIPPED, Row
from hf_kernel_patch.recognition import Site, build, forms
from hf_kernel_patch.registry import Kernel, has_own_apply, options_of
from hf_kernel_patch.settings import Settings

logger = logging.getLogger("hf_kernel_patch")
ledger = Ledger()
#: Every activation in force, oldest first; import hooks consult it.
active: list[Activation] = []
# Replacements are made once for a place and a kernel, so that patching again costs neither time
# nor a recompilation under torch.compile.
_made: dict[tuple[Any, ...], Any] = {}
_hooked: set[str] = set()


class Activation:
    """What one call of ``patch_transformers`` or one ``patched`` block put in force."""

    def __init__(self, settings: Settings, kernels: dict[str, Kernel], explicit: bool):
        self.settings = settings
        self.kernels = kernels
        self.explicit = explicit
        self.rows: list[Row] = []
        self._entries: list[tuple[Entry, Site]] = []
        self._waiting: dict[str, list[tuple[Target, Row]]] = {}
        self._complaints: list[str] = []
        self._ops: set[str] = set()
        self._counted: list[tuple[Site, Counter[str]]] = []

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
            self._stop_counting(0)
            return self._take_back(0)

    def _stop_counting(self, since: int) -> None:
        for site, counter in self._counted[since:]:
            site.counters[:] = [one for one in site.counters if one is not counter]
        del self._counted[since:]

    def imported(self, module: str) -> Callable[[], None]:
        """Patch a modelling module that has just been imported; returns what takes that back."""
        waiting, entries, counted = dict(self._waiting), len(self._entries), len(self._counted)

        def take_back() -> None:
            self._waiting, self._complaints = waiting, []
            self._take_back(entries)
            self._stop_counting(counted)
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
        """Undo all entries but the first ``since``, newest first."""
        blocked = []
        for entry, site in reversed(self._entries[since:]):
            site.release()
            if label := ledger.pop(entry):
                blocked.append(label)
        del self._entries[since:]
        return blocked

    def _consider(self, architecture: Architecture) -> None:
        """A row for every target of the table that a chosen kernel serves."""
        for target in architecture.targets:
            kernel = self.kernels.get(forms()[target.form].op)
            if kernel is not None and exists_here(target):
                row = Row(architecture.name, target.site, kernel.op, kernel.kernel_id, PENDING)
                self.rows.append(row)
                self._waiting.setdefault(target.module, []).append((target, row))
                if not forms()[target.form].unserved:
                    self._ops.add(kernel.op)

    def _cover(self, modules: list[str]) -> None:
        """Patch the waiting targets of modules that are imported."""
        functions: dict[int, tuple[Any, Site]] = {}
        classes: dict[type, tuple[Any, Row]] = {}
        for target, row in [pair for name in modules for pair in self._waiting.pop(name, [])]:
            found = locate(target)
            made = self._replacement(target, row, found)
            if isinstance(found, str) or isinstance(made, str):
                row.outcome, row.reason = SKIPPED, made
                if not forms()[target.form].unserved:
                    self._complaints.append(f"{row.site} is not patched by {row.kernel}: {made}")
                continue
            owner, name, value = found
            row.outcome, site = PATCHED, made.__hf_kernel_patch__
            site.counters.append(row.calls)
            self._counted.append((site, row.calls))
            if isinstance(owner, type):
                for kind in (owner, *wrapping_subclasses(owner, name)):
                    self._push(Attribute(kind, name), made)
                if name == "forward":
                    classes[owner] = made, row
            else:
                functions[id(value)] = value, made
        if functions:
            for module, name, held in globals_holding(functions):
                self._push(Attribute(module, name), functions[id(held)][1])
        if classes:
            self._reach_instances(classes)

    def _replacement(self, target: Target, row: Row, found: tuple[Any, str, Any] | str) -> Any:
        """The function to put in a target's place, or the reason why there is none."""
        if isinstance(found, str):
            return found
        owner, _, value = found
        kernel, original = self.kernels[row.op], original_of(value)
        adapter = forms()[target.form].adapter_for(original, owner)
        if isinstance(adapter, str):
            return adapter
        options = options_of(kernel, self.settings.options)
        key = (target, kernel, self.explicit, id(original), *sorted(options.items()))
        made = _made.get(key)
        if made is None or made.__hf_kernel_patch__.original is not original:
            made = build(adapter, Site(target.site, kernel, original, self.explicit, options))
            _made[key] = made
        return made

    def _push(self, slot: Attribute, value: Any) -> None:
        site = getattr(value, "__func__", value).__hf_kernel_patch__
        self._entries.append((ledger.push(slot, value), site))
        site.active += 1

    def _reach_instances(self, classes: dict[type, tuple[Any, Row]]) -> None:
        """Instances that own a forward bypass their class: reach inside, or report them."""
        unreached: dict[str, tuple[Row, list[Any]]] = {}
        found = self._shadows(classes)
        if not all(reachable for *_, reachable in found):
            # A module that owns a bound forward is a cycle: it may be dead but not collected yet.
            del found
            gc.collect()
            found = self._shadows(classes)
        for module, name, value, reachable in found:
            made, row = classes[owner_of(module, classes)]
            if reachable:
                self._push(Attribute(module, name, may_vanish=True), MethodType(made, module))
            elif name == "_old_forward" or "_old_forward" not in vars(module):
                unreached.setdefault(row.site, (row, []))[1].append(value)
        for row, values in unreached.values():
            row.outcome = SHADOWED
            row.reason = (
                f"{len(values)} instances own a forward ({describe(values[0])}) and are not "
                "reached; patch before it is set"
            )
            self._complaints.append(f"{row.site}: {row.reason}")

    def _shadows(self, classes: dict[type, tuple[Any, Row]]) -> list[tuple[Any, str, Any, bool]]:
        """(instance, name, value, whether it can be reached) of forwards that instances own."""
        return [
            (module, name, value, is_plain_bound(value, module, original))
            for module, name, value in shadows([made for made, _ in classes.values()], classes)
            for original in [classes[owner_of(module, classes)][0].__hf_kernel_patch__.original]
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
