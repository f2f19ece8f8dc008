"""One record for each function that is patched globally: the original and what is asked of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.patching.ledger import Attribute, Entry, Key, Slot, ledger
from hf_kernel_patch.patching.lookup import is_own_code
from hf_kernel_patch.patching.report import Row
from hf_kernel_patch.recognition import Composed, Request, composed
from hf_kernel_patch.recognition.composing import difference, made_of, source_hash
from hf_kernel_patch.recognition.measured import Measure, MeasuredSite
from hf_kernel_patch.recognition.site import Counters
from hf_kernel_patch.recognition.source import original_of
from hf_kernel_patch.recognition.wrappers import cells_of_itself

if TYPE_CHECKING:
    from torch import nn

_records: dict[int, Record] = {}
#: Told of each record whose function has become another.
changed: list[Callable[[Record], None]] = []


@dataclass(eq=False)
class Holder:
    """A request in force, the row that reports it, the keys of its slots, and who measures it.

    Classes that inherit one function have it in slots of their own, each asked for by itself.
    """

    request: Request
    row: Row
    slots: set[Key] = field(default_factory=set)
    measure: Measure | None = None


class Record:
    """An original, the requests in force on it, and every slot that holds what is made of both.

    What is installed is always made of the original and of all requests: of several for the same
    leaf or rule, the newest is served.
    """

    def __init__(self, original: object, owner: Any):
        self.original, self.owner = original, owner
        self.holders: list[Holder] = []
        self._slots: list[tuple[Entry, Callable[[object], object]]] = []
        self._made: list[Composed] = []
        self._itself = cells_of_itself(original)

    @property
    def requests(self) -> tuple[Request, ...]:
        """The newest request of each leaf and rule."""
        return tuple({holder.request.code: holder.request for holder in self.holders}.values())

    @property
    def composed(self) -> Composed:
        """What is installed, with its sites."""
        return self._made[-1]

    @property
    def function(self) -> Any:
        """What is installed."""
        return self.composed.function

    def add(self, holder: Holder) -> None:
        """Put one request more in force; the first time, no slot holds the function yet."""
        self.holders.append(holder)
        try:
            self._update()
        except BaseException:
            self.remove(holder)
            raise

    def made_before(self) -> list[int]:
        """The ids of what was made of the original in earlier patches, which somebody may hold."""
        return [id(made.function) for made in made_of(self.original)]

    def hold(
        self,
        slot: Slot,
        bind: Callable[[object], object] = lambda function: function,
        holder: Holder | None = None,
    ) -> None:
        """Install what is made in a slot, too; for one holder alone, or as long as there is any."""
        if holder is not None:
            holder.slots.add(slot.key)
        if not any(entry.slot.key == slot.key for entry, _ in self._slots):
            self._slots.append((ledger.push(slot, bind(self.function)), bind))

    def slots(self) -> list[Key]:
        """The keys of the slots that hold what is installed."""
        return [entry.slot.key for entry, _ in self._slots if not entry.slot.gone()]

    def holds(self, owner: object, name: str) -> bool:
        """Whether what is installed was put into this attribute."""
        return (id(owner), name) in self.slots()

    def foreign(self) -> list[tuple[Slot, object]]:
        """The slots where something else stands now, and what; not those that may vanish."""
        lasting = [e for e, _ in self._slots if not (e.slot.may_vanish or e.slot.gone())]
        found = [(entry, ledger.current(entry)) for entry in lasting]
        return [(entry.slot, value) for entry, value in found if value is not entry.value]

    def remove(self, holder: Holder) -> list[str]:
        """End a request; labels of slots that a foreign patch keeps from the original."""
        self.holders.remove(holder)
        if self.holders:
            only = holder.slots.difference(*(other.slots for other in self.holders))
            labels = [ledger.pop(entry) for entry, _ in self._slots if entry.slot.key in only]
            self._slots = [one for one in self._slots if one[0].slot.key not in only]
            self._update()
            return [label for label in labels if label]
        for made in self._made:
            for site in made.sites.values():
                site.release()
        _records.pop(id(self.original), None)
        # A module that was reloaded has put its own code there again, which is as it should be.
        anew = [
            slot.label
            for slot, value in self.foreign()
            if isinstance(slot, Attribute) and is_own_code(slot.owner, value)
        ]
        labels = [ledger.pop(entry) for entry, _ in reversed(self._slots)]
        self._tell_who_stands(self.original)
        for listener in changed:
            listener(self)
        return [label for label in labels if label and label.split(" (now")[0] not in anew]

    def _update(self) -> None:
        made = composed(self.original, self.owner, self.requests, alone=False)
        if not self._made or made is not self._made[-1]:
            self._install(made)
        for one in self._made:
            for request, site in one.sites.items():
                if request in self.requests:
                    site.counters[:] = self.counters(request)
                    if isinstance(site, MeasuredSite):
                        site.measures[None] = self.measure(request)
                    site.active = True
                elif site.active:
                    site.release()
        self._tell_who_stands(made.function)
        for listener in changed:
            listener(self)

    def _tell_who_stands(self, function: object) -> None:
        """Let the original and all that was made of it know what stands there.

        A layer's forward that somebody has kept would else no longer recompute activations.
        """
        made = made_of(self.original)
        for cell in [*self._itself, *(cell for one in made for cell in one.itself)]:
            cell.cell_contents = function

    def _install(self, made: Composed) -> None:
        older = [one for one in self._made if one is not made]
        self._made = [*older, made]
        replaced = [ledger.replace(entry, bind(made.function)) for entry, bind in self._slots]
        if all(replaced):  # else whoever has wrapped an older function still calls it
            self._made = [made]
            for one in older:
                for site in one.sites.values():
                    site.release()

    def measure(self, request: Request) -> Measure:
        """Who measures a request that is measured: of several patches the newest."""
        found = [h.measure for h in self.holders if h.request == request and h.measure is not None]
        return found[-1]

    def counters(self, request: Request) -> Counters:
        """The counters of all rows that report this request."""
        return [holder.row.calls for holder in self.holders if holder.request == request]


def describe_source(row: Row, request: Request, value: object) -> None:
    """Say in a row by what the code at its site is known, and which code it is."""
    original = original_of(value)
    row.code, row.original = request.code, source_hash(original)

    def diff() -> str:
        known = _records.get(id(original))
        return "" if known is None else difference(known.composed)

    row._diff = diff


def record_of(value: object, owner: object) -> Record:
    """The record of what stood in the place of ``value``, made where there is none."""
    original = original_of(value)
    return _records.setdefault(id(original), Record(original, owner))


def requests_on(value: object) -> Record | None:
    """The record of a function that is patched globally, if it is."""
    return _records.get(id(original_of(value)))


def bound_to(instance: nn.Module) -> Callable[[Any], object]:
    """Binds a function to an instance, which it does not keep alive."""
    reference = weakref.ref(instance)

    def bind(function: Any) -> object:
        alive = reference()
        return function if alive is None else MethodType(function, alive)

    return bind
