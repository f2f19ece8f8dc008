"""A clock and a cache of its own for each test; nothing of torch's is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_kernel_patch.measuring import measurement
from tests.measuring.worlds import Clock, hooks_left
from tests.support.probes import changed, places
from tests.support.tiny import modelling


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where choices are kept."""
    modelling("llama")
    before = places(), hooks_left()
    monkeypatch.setenv("HF_KERNEL_PATCH_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    assert (changed(before[0]), hooks_left()) == (set(), before[1])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that is measured by."""
    made = Clock()
    monkeypatch.setattr(measurement, "clock", made)
    return made
