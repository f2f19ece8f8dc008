"""Reversible replacement of attributes and mapping items.

Every patch is an entry on the stack of its slot. Removing one, in whatever order, leaves the
newest remaining entry in force; removing the last puts back the very object that was there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

MISSING: Any = object()


class Attribute:
    """An attribute of a module, class or instance, held weakly; an inherited one is missing."""

    def __init__(self, owner: Any, name: str):
        self._owner, self.name = weakref.ref(owner), name
        self.key = (id(owner), name)
        place = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None)
        self.label = f"{place or type(owner).__name__ + ' instance'}.{name}"

    def read(self) -> Any:
        """The owner's own value, or MISSING."""
        owner = self._owner()
        return MISSING if owner is None else vars(owner).get(self.name, MISSING)

    def write(self, value: Any) -> None:
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

    def __init__(self, owner: Any):
        super().__init__(owner, "__class__")

    def read(self) -> Any:
        return MISSING if (owner := self._owner()) is None else type(owner)


class Item:
    """An item of a mapping, such as a registry of transformers."""

    def __init__(self, mapping: MutableMapping[Any, Any], name: Any):
        self.mapping, self.name = mapping, name
        self.key = (id(mapping), name)
        self.label = f"{type(mapping).__name__}[{name!r}]"

    def read(self) -> Any:
        return self.mapping.get(self.name, MISSING)

    def write(self, value: Any) -> None:
        if value is MISSING:
            del self.mapping[self.name]
        else:
            self.mapping[self.name] = value

    def gone(self) -> bool:
        return False


Slot = Attribute | Item


@dataclass(eq=False)
class Entry:
    """One replacement in force."""

    slot: Slot
    value: Any


@dataclass
class _Stack:
    original: Any
    entries: list[Entry] = field(default_factory=list)


class Ledger:
    """All replacements in force, one stack a slot. ``lock`` is held around every change."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._stacks: dict[tuple[int, Any], _Stack] = {}

    def push(self, slot: Slot, value: Any) -> Entry:
        """Put ``value`` into ``slot`` and remember what was there."""
        with self.lock:
            stack = self._stacks.get(slot.key)
            if stack is None or stack.entries[-1].slot.gone():
                stack = _Stack(slot.read())
            slot.write(value)
            self._stacks[slot.key] = stack
            stack.entries.append(entry := Entry(slot, value))
            return entry

    def pop(self, entry: Entry) -> str | None:
        """Remove ``entry``; returns the slot's label where another's patch hinders restoring.

        Removing an entry that is no longer there does nothing.
        """
        with self.lock:
            stack = self._stacks.get(entry.slot.key)
            if stack is None or entry not in stack.entries:
                return None
            top = stack.entries[-1]
            stack.entries.remove(entry)
            if not stack.entries:
                del self._stacks[entry.slot.key]
            if entry.slot.gone():
                return None
            current = entry.slot.read()
            wanted = stack.entries[-1].value if stack.entries else stack.original
            if current is wanted:
                return None
            if current is not top.value:
                return None if stack.entries else f"{entry.slot.label} (now {_describe(current)})"
            entry.slot.write(wanted)
            return None


def _describe(value: Any) -> str:
    where = getattr(value, "__globals__", {}).get("__name__") or type(value).__module__
    return f"{getattr(value, '__qualname__', type(value).__qualname__)} of {where}"
