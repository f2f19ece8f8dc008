"""The ledger by itself, on plain objects."""

from __future__ import annotations

import gc
from itertools import permutations
from typing import Any

import pytest

from hf_kernel_patch.patching.ledger import MISSING, Attribute, ClassOf, Item, Ledger


class Base:
    def method(self) -> str:
        return "base"

    @staticmethod
    def static() -> str:
        return "static"

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    @property
    def prop(self) -> str:
        return "property"


class Child(Base):
    pass


def foreign(self: Any) -> str:
    """A patch of somebody else."""
    return "foreign"


@pytest.fixture
def owner() -> type:
    return type("Owner", (Base,), {"method": lambda self: "original"})


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_removal_in_any_order_leaves_the_newest_in_force_and_ends_at_the_original(
    owner: type, order: tuple[int, ...]
) -> None:
    ledger, original = Ledger(), vars(owner)["method"]
    values = [lambda self, n=n: n for n in range(3)]
    entries = [ledger.push(Attribute(owner, "method"), value) for value in values]
    remaining = [0, 1, 2]
    for index in order:
        assert vars(owner)["method"] is values[remaining[-1]]
        assert ledger.pop(entries[index]) is None
        remaining.remove(index)
        if not remaining:
            break
    assert vars(owner)["method"] is original
    assert not ledger._stacks


@pytest.mark.parametrize("name", ["method", "static", "of_class", "prop"])
def test_descriptors_come_back_as_the_very_objects(name: str) -> None:
    ledger, original = Ledger(), vars(Base)[name]
    entry = ledger.push(Attribute(Base, name), lambda *args: "ours")
    assert vars(Base)[name] is not original
    ledger.pop(entry)
    assert vars(Base)[name] is original


def test_an_attribute_that_was_inherited_is_deleted_again() -> None:
    ledger = Ledger()
    entry = ledger.push(Attribute(Child, "method"), lambda self: "ours")
    assert (Child().method(), Base().method()) == ("ours", "base")
    ledger.pop(entry)
    assert "method" not in vars(Child)
    assert Child().method() == "base"


def test_an_instance_attribute_that_was_not_there_is_deleted_again() -> None:
    ledger, instance = Ledger(), Child()
    entry = ledger.push(Attribute(instance, "method"), lambda: "ours")
    assert instance.method() == "ours"
    ledger.pop(entry)
    assert vars(instance) == {}


def test_the_class_of_an_instance_comes_back_and_others_keep_theirs() -> None:
    ledger, one, other = Ledger(), Base(), Base()
    entry = ledger.push(ClassOf(one), Child)
    assert (type(one), type(other)) == (Child, Base)
    ledger.pop(entry)
    assert type(one) is Base
    assert vars(one) == {}


def test_items_of_a_mapping_come_back_or_go() -> None:
    original = object()
    ledger, mapping = Ledger(), {"there": original}
    entries = [ledger.push(Item(mapping, name), object()) for name in ("there", "new")]
    assert mapping["there"] is not original
    for entry in entries:
        assert ledger.pop(entry) is None
    assert mapping == {"there": original}
    assert mapping["there"] is original


def test_removing_an_entry_twice_does_nothing(owner: type) -> None:
    ledger = Ledger()
    first = ledger.push(Attribute(owner, "method"), lambda self: "first")
    second = ledger.push(Attribute(owner, "method"), lambda self: "second")
    ledger.pop(first)
    ledger.pop(first)
    assert owner().method() == "second"
    ledger.pop(second)
    ledger.pop(second)
    assert owner().method() == "original"


def test_equal_entries_are_told_apart(owner: type) -> None:
    ledger, value, original = Ledger(), foreign, vars(owner)["method"]
    entries = [ledger.push(Attribute(owner, "method"), value) for _ in range(2)]
    assert entries[0] != entries[1]
    ledger.pop(entries[0])
    assert vars(owner)["method"] is value
    ledger.pop(entries[1])
    assert vars(owner)["method"] is original


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_foreign_value_over_ours_stays_and_is_named_once(
    owner: type, order: tuple[int, int]
) -> None:
    ledger = Ledger()
    entries = [ledger.push(Attribute(owner, "method"), lambda self: "ours") for _ in range(2)]
    owner.method = foreign  # type: ignore[attr-defined]
    labels = [ledger.pop(entries[index]) for index in order]
    assert vars(owner)["method"] is foreign
    assert labels[0] is None
    assert labels[1] is not None
    assert "Owner.method" in labels[1]
    assert f"foreign of {__name__}" in labels[1]
    assert not ledger._stacks


def test_a_foreign_value_that_was_taken_away_again_does_not_hinder(owner: type) -> None:
    ledger, original = Ledger(), vars(owner)["method"]
    entry = ledger.push(Attribute(owner, "method"), lambda self: "ours")
    owner.method = foreign  # type: ignore[attr-defined]
    owner.method = entry.value  # type: ignore[attr-defined]
    assert ledger.pop(entry) is None
    assert vars(owner)["method"] is original


def test_a_foreign_value_between_two_of_ours_comes_back_into_force(owner: type) -> None:
    ledger = Ledger()
    lower = ledger.push(Attribute(owner, "method"), lambda self: "lower")
    owner.method = foreign  # type: ignore[attr-defined]
    upper = ledger.push(Attribute(owner, "method"), lambda self: "upper")
    ledger.pop(upper)
    assert vars(owner)["method"] is foreign
    assert "foreign" in str(ledger.pop(lower))
    assert vars(owner)["method"] is foreign


def test_a_foreign_value_between_two_of_ours_outlives_the_lower_one(owner: type) -> None:
    ledger = Ledger()
    lower = ledger.push(Attribute(owner, "method"), lambda self: "lower")
    owner.method = foreign  # type: ignore[attr-defined]
    upper = ledger.push(Attribute(owner, "method"), lambda self: "upper")
    ledger.pop(lower)
    assert owner().method() == "upper"
    ledger.pop(upper)
    assert vars(owner)["method"] is foreign


def test_a_write_that_fails_leaves_nothing() -> None:
    class Closed:
        def __setattr__(self, name: str, value: Any) -> None:
            raise AttributeError(f"{name} is closed")

    ledger, closed = Ledger(), Closed()
    with pytest.raises(AttributeError, match="closed"):
        ledger.push(Attribute(closed, "method"), foreign)
    assert not ledger._stacks
    assert vars(closed) == {}


def test_owners_are_held_weakly_and_their_entries_can_still_be_removed() -> None:
    ledger = Ledger()
    entry = ledger.push(Attribute(Child(), "method"), foreign)
    gc.collect()
    assert entry.slot.gone()
    assert entry.slot.read() is MISSING
    assert ledger.pop(entry) is None
    assert not ledger._stacks


def test_an_owner_at_the_address_of_a_dead_one_starts_afresh() -> None:
    ledger = Ledger()
    stale = ledger.push(Attribute(Child(), "method"), foreign)
    gc.collect()
    child = Child()
    slot = Attribute(child, "method")
    slot.key = stale.slot.key  # as if the allocator had used the address again
    entry = ledger.push(slot, lambda: "ours")
    ledger.pop(stale)
    assert child.method() == "ours"
    ledger.pop(entry)
    assert vars(child) == {}


def test_labels_name_the_place() -> None:
    assert Attribute(Child, "method").label == "Child.method"
    assert Attribute(Child(), "method").label == "Child instance.method"
    assert Attribute(pytest, "raises").label == "pytest.raises"
    assert Item({}, "name").label == "dict['name']"
