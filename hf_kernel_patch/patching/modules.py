"""One record for each module of a model that is patched alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hf_kernel_patch.patching.ledger import Attribute, ClassOf, Entry, ledger
from hf_kernel_patch.patching.lookup import called_through, describe, is_plain_bound
from hf_kernel_patch.patching.records import Record, bound_to, changed, requests_on
from hf_kernel_patch.patching.report import Outcome, Row
from hf_kernel_patch.patching.subclass import root_of, subclass
from hf_kernel_patch.recognition import Composed, Request, composed
from hf_kernel_patch.recognition.measured import Measure, MeasuredSite
from hf_kernel_patch.recognition.source import innermost, made_by_us, original_of
from hf_kernel_patch.recognition.wrappers import cells_of_itself

if TYPE_CHECKING:
    from torch import nn

OWN_FORWARDS = ("forward", "_old_forward")
_patched: dict[int, Module] = {}


class Applied(Protocol):
    """What this file knows of an application: the modules it holds, and their model."""

    modules: list[Module]

    @property
    def measure(self) -> Measure | None:
        """Who measures what it has patched, if anybody does."""

    def model(self) -> object:
        """The model, or None where it is gone."""


@dataclass(eq=False)
class Wish:
    """What one application asks of a method of one module, and the row that reports it."""

    method: str
    request: Request
    row: Row
    application: Applied


class Module:
    """The wishes in force on a module, and the subclass that it takes for them.

    A method is made of all of them and of what is asked of its class's globally; of several for
    the same leaf or rule the newest is served, and a module's own before a global one.
    """

    def __init__(self, module: nn.Module):
        self.root = root_of(type(module))
        self.wishes: list[Wish] = []
        self._key = key = id(module)
        self._module = weakref.ref(module, lambda _: _forget(key))
        self._class: Entry | None = None
        self._forwards: list[tuple[Entry, Callable[[object], object]]] = []
        self.composed: dict[str, Composed] = {}
        #: Of a copy, what the copied module runs, whatever its class runs by now.
        self._as_in_twin: dict[str, object] = {}

    @property
    def module(self) -> nn.Module | None:
        """The module, or None where it is gone."""
        return self._module()

    def original(self, method: str) -> Any:
        """What the module's own class runs; while it is patched, what it ran then."""
        made = self.composed.get(method)
        if made is not None:
            return made.original
        return self._as_in_twin.get(method) or original_of(getattr(self.root, method))

    def asks(self, method: str, request: Request, application: Applied) -> bool:
        """Whether an equal request is served already, of an application to the same model."""
        newest = {w.request.code: w for w in self.wishes if w.method == method}
        known = newest.get(request.code)
        if known is None or known.request != request:
            return False
        return bool(known.application.model() is application.model())

    def add(self, wish: Wish) -> None:
        """Put one wish more in force."""
        self.wishes.append(wish)
        try:
            self._update()
        except BaseException:
            self.remove([wish])
            raise
        _patched[self._key] = self

    def remove(self, wishes: list[Wish]) -> list[str]:
        """End wishes; labels of what a foreign patch keeps from the original."""
        self.wishes = [one for one in self.wishes if one not in wishes]
        if self.wishes:
            self._update()
            return []
        self._leave(self.composed, {})
        _patched.pop(self._key, None)
        entries = [*(entry for entry, _ in self._forwards), *([self._class] if self._class else ())]
        labels = [ledger.pop(entry) for entry in reversed(entries)]
        self._let_go_of_forwards()
        return [label for label in labels if label]

    def _let_go_of_forwards(self) -> None:
        """What a hook has kept of ours on the module becomes what its class runs again."""
        module, made = self.module, self.composed.get("forward")
        if module is None or made is None:
            return
        for name in OWN_FORWARDS:
            value = vars(module).get(name)
            if not self._is_ours(value) or original_of(value.__func__) is not made.original:
                continue
            kept = made_by_us(value.__func__).sites.values()
            if any(site.modules is not None for site in kept):  # and not of a global patch
                vars(module)[name] = bound_to(module)(type(module).forward)

    def refresh(self, record: Record) -> None:
        """What is asked globally of some function has changed."""
        if any(self.original(method) is record.original for method in self.composed):
            self._update()

    def state(self, wish: Wish, reason: str) -> tuple[Outcome, str]:
        """The outcome of a wish now, and the reason for it; ``reason`` is what it has already."""
        module = self.module
        owned = self._foreign_forward() if wish.method == "forward" else None
        if owned is not None and not self._is_called_by(owned):
            return (
                Outcome.SHADOWED,
                f"a module owns a forward ({describe(owned)}) and is not reached",
            )
        if wish.method not in self.composed:
            return (
                Outcome.SHADOWED,
                "a module had a forward of its own when it was patched: unpatch it first",
            )
        runs = getattr(type(module), wish.method, None)
        if innermost(runs) is not innermost(self.original(wish.method)):
            return Outcome.SHADOWED, f"a module runs {describe(runs)} instead"
        now = original_of(getattr(self.root, wish.method, None))
        if now is not self.original(wish.method):
            was = f"{self.root.__qualname__}.{wish.method} was patched later by {describe(now)}"
            return Outcome.PATCHED, f"{was}, which does not reach this model: unpatch it first"
        return Outcome.PATCHED, reason

    def _foreign_forward(self) -> Any:
        """The forward that the module owns, where it is none of ours; what hooks keep, if any."""
        owned = vars(self.module).get("_old_forward", vars(self.module).get("forward"))
        return None if self._is_ours(owned) else owned

    def _is_called_by(self, owned: object) -> bool:
        """Whether a forward that was put there for mixed precision calls ours."""
        made = self.composed.get("forward")
        return made is not None and called_through(owned) is made.function

    def _is_left(self, method: str) -> bool:
        """Whether a layer stays in its class, since what it owns may call the class's forward.

        That would recompute no activations where the module's class had another one.
        """
        if method != "forward" or method in self.composed:
            return False
        owned, original = self._foreign_forward(), self.original(method)
        if owned is None or is_plain_bound(owned, self.module, original):
            return False
        return bool(cells_of_itself(original))

    def _is_ours(self, owned: object) -> bool:
        made = made_by_us(getattr(owned, "__func__", None))
        return made is not None and getattr(owned, "__self__", None) is self.module

    def _update(self) -> None:
        module = self.module
        if module is None:
            return
        made: dict[str, Composed] = {}
        for method in dict.fromkeys(one.method for one in self.wishes):
            if self._is_left(method):
                continue
            original = self.original(method)
            asked = requests_on(original)
            requests = {one.code: one for one in (asked.requests if asked else ())}
            requests |= {w.request.code: w.request for w in self.wishes if w.method == method}
            made[method] = composed(original, self.root, tuple(requests.values()), alone=True)
        if not made and self._class is None:
            return
        kind = subclass(self.root, {name: one.function for name, one in made.items()}, adopt)
        if self._class is None:
            self._class = ledger.push(ClassOf(module), kind)
        else:
            ledger.replace(self._class, kind)
        before, self.composed = self.composed, made
        for method, one in made.items():
            self._enter(method, one, requests_on(one.original))
        self._leave(before, made)
        if "forward" in made and made["forward"] is not before.get("forward"):
            self._reach(module, made["forward"])

    def _enter(self, method: str, made: Composed, asked: Record | None) -> None:
        """Let the sites know the module, and whose calls to count."""
        for request, site in made.sites.items():
            rows = [w.row for w in self.wishes if w.method == method and w.request == request]
            counters = [row.calls for row in rows]
            if not counters and asked is not None:
                counters = asked.counters(request)
            assert site.modules is not None
            site.modules[self._key] = counters
            if isinstance(site, MeasuredSite):
                site.measures[self._key] = self._measure(method, request, asked)
            site.active = True
        for cell in made.itself:
            cell.cell_contents = made.function

    def _measure(self, method: str, request: Request, asked: Record | None) -> Measure:
        """Who measures a request that is measured, of the module's own or a global one."""
        asking = [w.application for w in self.wishes if (w.method, w.request) == (method, request)]
        if asking and (measure := asking[-1].measure) is not None:
            return measure
        assert asked is not None
        return asked.measure(request)

    def _leave(self, before: dict[str, Composed], made: dict[str, Composed]) -> None:
        """Take the module from the sites that no longer serve it."""
        kept = {id(site) for one in made.values() for site in one.sites.values()}
        for one in before.values():
            for site in one.sites.values():
                if id(site) not in kept and site.modules is not None:
                    site.modules.pop(self._key, None)
                    if isinstance(site, MeasuredSite):
                        site.measures.pop(self._key, None)
                    if not site.modules:
                        site.release()
            if not any(site.active for site in one.sites.values()):
                for cell in one.itself:  # somebody may have kept it, of a layer that recomputes
                    cell.cell_contents = one.original

    def _reach(self, module: nn.Module, made: Composed) -> None:
        """The class's forward that the module owns, bound to itself, becomes ours too."""
        for entry, bind in self._forwards:
            ledger.replace(entry, bind(made.function))
        held = {entry.slot.name for entry, _ in self._forwards}
        for name in OWN_FORWARDS:
            value = vars(module).get(name)
            if name not in held and is_plain_bound(value, module, made.original):
                bind = bound_to(module)
                slot = Attribute(module, name, may_vanish=True)
                self._forwards.append((ledger.push(slot, bind(made.function)), bind))

    def forget(self) -> None:
        """The module is gone."""
        self._leave(self.composed, {})


def module_patch(module: nn.Module) -> Module:
    """The record of a module; a new one is kept when something is added."""
    return _patched.get(id(module)) or Module(module)


def adopt(module: nn.Module, twin: nn.Module) -> None:
    """Keep a copy of a patched module patched; ``twin`` comes in its original class."""
    known = _patched.get(id(module))
    if known is None or known.module is not module:
        return
    with ledger.lock:
        copied = Module(twin)
        copied._as_in_twin = {name: made.original for name, made in known.composed.items()}
        for name in OWN_FORWARDS:
            function = getattr(vars(twin).get(name), "__func__", None)
            if function is not None and original_of(function) is not function:
                vars(twin)[name] = bound_to(twin)(original_of(function))
        for wish in known.wishes:
            copied.add(Wish(wish.method, wish.request, wish.row, wish.application))
            wish.application.modules.append(copied)


def _forget(key: int) -> None:
    known = _patched.pop(key, None)
    if known is not None:
        known.forget()


def _refresh(record: Record) -> None:
    for known in list(_patched.values()):
        known.refresh(record)


changed.append(_refresh)
