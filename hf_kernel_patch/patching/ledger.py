"""Reversible replacement of attributes and mapping items.

Every patch is an entry on the stack of its slot and holds what was there before it. Removing one,
in whatever order, leaves the newest remaining entry in force; removing the last puts back the very
object that was there.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

MISSING: Any = object()
#: Of a slot: the id of what holds it, and its name there.
Key = tuple[int, str]


class Attribute:
    """An attribute of a module, class or instance, held weakly; an inherited one is missing."""

    def __init__(self, owner: object, name: str, may_vanish: bool = False):
        #: Whether others may delete it in their own right, as a hook that is removed does.
        self.may_vanish = may_vanish
        self._owner, self.name = weakref.ref(owner), name
        self.key = (id(owner), name)
        place = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None)
        self.label = f"{place or type(owner).__name__ + ' instance'}.{name}"

    @property
    def owner(self) -> Any:
        """The owner, or None where it is gone."""
        return self._owner()

    def read(self) -> Any:
        """The owner's own value, or MISSING."""
        owner = self._owner()
        return MISSING if owner is None else vars(owner).get(self.name, MISSING)

    def write(self, value: object) -> None:
        owner = self._owner()
        if owner is None:
            return
        if value is MISSING:
            delattr(owner, self.name)
        else:
            setattr(owner, self.name, value)

    def gone(self) -> bool:
        return self._owner() is None


class ClassOf(Attribute):
    """The class of an instance, held weakly."""

    def __init__(self, owner: object):
        super().__init__(owner, "__class__")

    def read(self) -> Any:
        return MISSING if (owner := self._owner()) is None else type(owner)


class Item:
    """An item of a mapping, such as a registry of transformers.

    ``order`` is the mapping's keys as they were, to bring a deleted item back to its place.
    """

    may_vanish = False

    def __init__(self, mapping: MutableMapping[str, object], name: str, order: Iterable[str] = ()):
        self.mapping, self.name, self._order = mapping, name, list(order)
        self.key = (id(mapping), name)
        self.label = f"{type(mapping).__name__}[{name!r}]"

    def read(self) -> Any:
        return self.mapping.get(self.name, MISSING)

    def write(self, value: object) -> None:
        if value is MISSING:
            del self.mapping[self.name]
            return
        added = self.name not in self.mapping
        self.mapping[self.name] = value
        if added and self.name in self._order:
            for later in self._order[self._order.index(self.name) + 1 :]:
                if later in self.mapping:
                    self.mapping[later] = self.mapping.pop(later)

    def gone(self) -> bool:
        return False


Slot = Attribute | Item


@dataclass(eq=False)
class Entry:
    """One replacement in force, and what was there before it."""

    slot: Slot
    value: object
    before: object


_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


class Ledger:
    """All replacements in force, one stack a slot. ``lock`` is held around every change.

    A process that forks waits a moment for a change in another thread to end, so that its child
    finds no half of it; the child has a lock of its own, which no thread holds.
    """

    #: Seconds. The thread that holds the lock may itself wait for the one that forks.
    patience = 1.0

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._forking: set[int] = set()  # threads that have taken the lock for their fork
        _ledgers.add(self)
        self._stacks: dict[Key, list[Entry]] = {}

    def before_fork(self) -> None:
        if self.lock.acquire(timeout=self.patience):
            self._forking.add(threading.get_ident())

    def after_fork(self, in_child: bool) -> None:
        taken = threading.get_ident() in self._forking
        self._forking.discard(threading.get_ident())
        if in_child:
            self.lock = threading.RLock()
            self._forking.clear()
        elif taken:
            self.lock.release()

    def push(self, slot: Slot, value: object) -> Entry:
        """Put ``value`` into ``slot`` and remember what was there."""
        with self.lock:
            entry = Entry(slot, value, slot.read())
            slot.write(value)
            stack = self._stacks.get(slot.key, [])
            if stack and stack[-1].slot.gone():  # another object that had the same id
                stack = []
            self._stacks[slot.key] = [*stack, entry]
            return entry

    def replace(self, entry: Entry, value: object) -> bool:
        """Put another value of ours in an entry's place; False where somebody else's stands there.

        Then the entry stays what it was.
        """
        with self.lock:
            stack = self._stacks.get(entry.slot.key, [])
            if entry not in stack or entry.slot.gone():
                return True
            place = stack.index(entry)
            above = stack[place + 1] if place + 1 < len(stack) else None
            current = above.before if above else entry.slot.read()
            if current is MISSING and entry.slot.may_vanish:
                return True
            if current is not entry.value:
                return False
            if above:
                above.before = value
            else:
                entry.slot.write(value)
            entry.value = value
            return True

    def current(self, entry: Entry) -> Any:
        """What stands in an entry's place: its own value, somebody else's, or MISSING."""
        with self.lock:
            stack = self._stacks.get(entry.slot.key, [])
            above = stack[stack.index(entry) + 1 :] if entry in stack else []
            return above[0].before if above else entry.slot.read()

    def pop(self, entry: Entry) -> str | None:
        """Remove ``entry``; returns the slot's label where another's patch hinders restoring.

        Removing an entry that is no longer there does nothing.
        """
        with self.lock:
            stack = self._stacks.get(entry.slot.key, [])
            if entry not in stack:
                return None
            place = stack.index(entry)
            above = stack[place + 1] if place + 1 < len(stack) else None
            self._stacks[entry.slot.key] = stack = stack[:place] + stack[place + 1 :]
            if not stack:
                del self._stacks[entry.slot.key]
            if entry.slot.gone():
                return None
            current = above.before if above else entry.slot.read()
            if current is entry.before or (current is MISSING and entry.slot.may_vanish):
                return None
            if current is not entry.value:
                # Named once, by the last of ours in this place.
                return None if stack else f"{entry.slot.label} (now {_describe(current)})"
            if above:
                above.before = entry.before
            else:
                entry.slot.write(entry.before)
            return None


def undo_all(steps: Iterable[Callable[[], list[str]]]) -> list[str]:
    """Do every step, whatever another one raises, and then raise the first of that.

    Returns the labels that the steps return, of slots that a foreign patch keeps from us.
    """
    labels: list[str] = []
    failures: list[BaseException] = []
    for step in steps:
        try:
            labels += step()
        except BaseException as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return labels


def _before_fork() -> None:
    for one in list(_ledgers):
        one.before_fork()


def _after_fork(in_child: bool) -> None:
    for one in list(_ledgers):
        one.after_fork(in_child)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=lambda: _after_fork(in_child=False),
        after_in_child=lambda: _after_fork(in_child=True),
    )


def _describe(value: object) -> str:
    where = getattr(value, "__globals__", {}).get("__name__") or type(value).__module__
    return f"{getattr(value, '__qualname__', type(value).__qualname__)} of {where}"


#: The ledger of everything that is patched in this process.
ledger = Ledger()
