"""The tests here run on the simulated device, or say why they do not, without being imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import npusim


def _why_not() -> str | None:
    if not npusim.requested():
        return f"the simulated npu device is asked for by {npusim.VARIABLE}=1"
    return npusim.available()


WHY_NOT = _why_not()
if WHY_NOT is None:  # before any test module, and so before anything imports torch_npu
    npusim.start()


class NotRun(pytest.Item):
    """Stands for the tests of a file; skipped, so that pytest still ends in success."""

    def runtest(self) -> None:
        pytest.skip(WHY_NOT or "")

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name


class NotImported(pytest.File):
    """A file of tests that is left alone."""

    def collect(self) -> Iterator[pytest.Item]:
        yield NotRun.from_parent(self, name="not run")


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Collector | None:
    if WHY_NOT is None:
        return None
    return NotImported.from_parent(parent, path=module_path)


@pytest.fixture
def calls() -> Callable[[], dict[str, int]]:
    """Operator name -> how often it ran on the device since the test began."""
    npusim.reset_calls()
    return npusim.calls
