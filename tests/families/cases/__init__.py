"""The data: which classes of which families are tried, and why the others are not."""

from __future__ import annotations

from tests.families.building import Case
from tests.families.cases import images, others, own_texts, texts
from tests.families.cases.skipped import CLASSES, SKIPPED

__all__ = ["CASES", "CLASSES", "SKIPPED"]

CASES: tuple[Case, ...] = tuple(
    Case(family, name, file.CHANGES.get(name, {}), kind)
    for file in (texts, own_texts, images, others)
    for kind, lines in file.FAMILIES.items()
    for family, *names in map(str.split, lines.strip().splitlines())
    for name in names
)
