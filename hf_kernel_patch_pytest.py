"""A plugin for pytest: tests that leave a patch behind fail, and a fixture that patches.

It is a module of its own, since pytest imports the plugins of all installed packages: nothing of
hf_kernel_patch is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import pytest

OPTION = "--hf-kernel-patch-leaks"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("hf_kernel_patch").addoption(
        OPTION,
        action="store_true",
        help="Fail each test that leaves a patch of hf_kernel_patch in force, and end the patch.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "hf_kernel_patch(...): what patched_transformers patches, as for patched()"
    )
    if config.getoption(OPTION):
        config.pluginmanager.register(_Leaks(), "hf_kernel_patch_leaks")


@pytest.fixture
def patched_transformers(request: pytest.FixtureRequest) -> Iterator[Any]:
    """transformers, patched until the test ends; the value is the report.

    What is patched is said by the marker ``hf_kernel_patch(...)``, which takes the arguments of
    ``hf_kernel_patch.patched``, or by a parameter: what to include, or a mapping of arguments.
    """
    from hf_kernel_patch import patched

    marker = request.node.get_closest_marker("hf_kernel_patch")
    arguments: tuple[Any, ...] = marker.args if marker else ()
    options: dict[str, Any] = dict(marker.kwargs) if marker else {}
    given = getattr(request, "param", {})
    if isinstance(given, Mapping):
        options.update(given)
    else:
        arguments = (given,)
    with patched(*arguments, **options) as report:
        yield report


class _Leaks:
    """Compares what is in force before and after each test.

    What a fixture of a wider scope has patched may stay until that fixture ends.
    """

    def __init__(self) -> None:
        self._before: list[Any] = []
        #: Fixture -> the patches that began while it was set up.
        self._kept: dict[Any, list[Any]] = {}

    def pytest_sessionstart(self) -> None:
        import hf_kernel_patch  # noqa: F401 - what the environment asks for is no test's doing

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, object, object]:
        self._before = self._in_force()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, object]:
        before = self._in_force()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                began = [one for one in self._in_force() if one not in before]
                self._kept.setdefault(fixturedef, []).extend(began)

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        for one in self._kept.pop(fixturedef, []):
            if one in self._before:  # which has to be gone by now
                self._before.remove(one)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        try:
            return (yield)
        finally:
            self._check(item)

    def _check(self, item: pytest.Item) -> None:
        from hf_kernel_patch.integrations import leaks

        kept = [one for patches in self._kept.values() for one in patches]
        left = [one for one in leaks.in_force() if one not in [*self._before, *kept]]
        if left:
            left = leaks.still_alive(left)
        if left:
            told = "\n".join(map(leaks.describe, left))
            leaks.end(left)
            pytest.fail(f"{item.nodeid} leaves patches in force:\n{told}", pytrace=False)

    def _in_force(self) -> list[Any]:
        from hf_kernel_patch.integrations import leaks

        return leaks.in_force()
