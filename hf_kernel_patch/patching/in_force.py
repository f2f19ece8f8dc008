"""What has become of a patch: what others have put in its place, or kept of an earlier one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial
from types import CellType
from typing import Any, TypeVar

from hf_kernel_patch.patching.ledger import MISSING
from hf_kernel_patch.patching.lookup import (
    describe,
    inheriting,
    is_own_code,
    is_plain_bound,
    owned_forwards,
    owner_of,
)
from hf_kernel_patch.patching.records import Record
from hf_kernel_patch.patching.report import Outcome, Row
from hf_kernel_patch.recognition import Request, why_not
from hf_kernel_patch.recognition.composing import Located, cells_of_originals, made_of
from hf_kernel_patch.recognition.source import made_by_us, original_of

ANEW = "the module was loaded anew and is not patched: call patch_transformers() again"
#: What may hold a function for good and is worth a word.
_HOLDERS = staticmethod, classmethod, partial, CellType, type

Found = TypeVar("Found", list[tuple[Any, Any]], dict[int, str])
Classes = dict[type, tuple[Record, Row]]
#: id of a function of an earlier patch -> itself, and the record of the site that it was of.
Older = dict[int, tuple[object, Record]]


def state_of(records: list[Record], found: Located | str) -> tuple[Outcome, str]:
    """The outcome of a site and the reason for it, from what is in force for it.

    ``found`` is what ``locate`` says of it now.
    """
    if isinstance(found, str):
        return Outcome.SHADOWED, found
    owner, name, _ = found
    if not any(record.holds(owner, name) for record in records):
        return Outcome.SHADOWED, ANEW
    for place, record in enumerate(records):
        later = {key for one in records[place + 1 :] for key in one.slots()}
        for slot, value in record.foreign():
            if slot.key in later:
                continue
            if is_own_code(owner, value):
                return Outcome.SHADOWED, ANEW
            by = "deleted" if value is MISSING else f"patched over by {describe(value)}"
            return Outcome.SHADOWED, f"{slot.label} was {by}"
    return Outcome.PATCHED, ""


def why_none(row: Row, found: Located | str, request: Request) -> tuple[Outcome, str]:
    """The outcome of a site that nothing is in force on, and the reason for it."""
    again = "call patch_transformers() again"
    if row.outcome == Outcome.PENDING:
        return Outcome.PENDING, f"the module was imported without being noticed: {again}"
    if isinstance(found, str):
        return Outcome.SKIPPED, found
    owner, _, value = found
    reason = why_not(original_of(value), owner, request)
    return Outcome.SKIPPED, reason or f"it could not be patched then, but can be now: {again}"


def in_front(classes: Classes, records: Iterable[Record]) -> tuple[list[Located], bool]:
    """What may stand in front of a patch that was just made.

    Returns the forwards that instances of the classes own, dead ones too, and whether ``bypassed``
    or ``kept_of_earlier`` may find anything. Mostly they do not, and each would go through all
    objects of the process: this does it once for all.
    """
    kinds, older = _kinds(classes), _older(records)
    if not kinds and not older:
        return [], False
    holders = gc.get_referrers(*kinds, *(function for function, _ in older.values()))
    owned = owned_forwards(holders, kinds)
    return owned, bool(owned or _kept_by(holders, older))


def bypassed(classes: Classes) -> list[tuple[Row, str]]:
    """(row, reason) where instances own a forward in front of the one that is patched."""
    if not classes:
        return []
    by_row: dict[int, tuple[Row, list[object]]] = {}
    for module, value in _alive(lambda: _owned(classes)):
        row = classes[owner_of(module, classes)][1]
        by_row.setdefault(id(row), (row, []))[1].append(value)
    return [
        (
            row,
            f"{len(values)} instances own a forward ({describe(values[0])}) and are not reached; "
            "patch before it is set",
        )
        for row, values in by_row.values()
    ]


def _kinds(classes: Classes) -> set[type]:
    """The classes with those of their subclasses that have the same forwards."""
    return inheriting([record.function for record, _ in classes.values()], classes)


def _owned(classes: Classes) -> list[tuple[Any, Any]]:
    """(instance, forward) of the instances that own one which does not lead to ours."""
    kinds = _kinds(classes)
    return [
        (module, value)
        for module, name, value in owned_forwards(gc.get_referrers(*kinds), kinds)
        if name == "_old_forward" or "_old_forward" not in vars(module)
        for original in [classes[owner_of(module, classes)][0].original]
        if not (is_plain_bound(value, module, original) and made_by_us(value.__func__))
    ]


def kept_of_earlier(records: Iterable[Record]) -> dict[int, str]:
    """id of a record -> who holds a function of an earlier patch, which this one cannot reach.

    Such a function runs the original.
    """
    older = _older(records)
    return _alive(lambda: _kept(older)) if older else {}


def _older(records: Iterable[Record]) -> Older:
    """The functions that earlier patches of the same sites have made."""
    return {
        id(made.function): (made.function, record)
        for record in records
        for made in made_of(record.original)
        if made is not record.composed
    }


def _alive(find: Callable[[], Found]) -> Found:
    """What is found, after what is dead but not collected yet has gone.

    Closures, and modules that own a bound forward, are cycles. What has a finalizer lets go of
    others at the first collection, which takes them at the next.
    """
    for _ in range(2):
        if not (found := find()):
            return found
        del found  # it would keep what it names alive
        gc.collect()
    return find()


def _kept(older: Older) -> dict[int, str]:
    """As ``kept_of_earlier``, of these functions."""
    return _kept_by(gc.get_referrers(*(function for function, _ in older.values())), older)


def _kept_by(holders: Iterable[Any], older: Older) -> dict[int, str]:
    """As ``kept_of_earlier``, of these functions, looking at what may hold them."""
    kept: dict[int, str] = {}
    ours = cells_of_originals()
    for holder in holders:
        if type(holder) is dict:
            if older.keys().isdisjoint(map(id, list(holder.values()))):
                continue
            kinds = [one for one in gc.get_referrers(holder) if isinstance(one, type)]
            holder = next((one for one in kinds if one.__dict__ == holder), None)
        if not isinstance(holder, _HOLDERS) or id(holder) in ours:
            continue
        named = getattr(holder, "__qualname__", "") if isinstance(holder, type) else ""
        for held in gc.get_referents(holder if not named else vars(holder)):
            if id(held) in older:
                what = f"the class {named}" if named else f"a {type(holder).__name__}"
                kept[id(older[id(held)][1])] = (
                    f"{what} holds a function of an earlier patch, which runs the original"
                )
    return kept
