"""Each test runs with all models patched, and with one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import decoding


@pytest.fixture(params=["everywhere", "alone"])
def fused(request: Any) -> decoding.Fused:
    """A patch for a ``with`` block, of all models or of the one that is given."""
    scopes: dict[str, decoding.Fused] = {
        "everywhere": decoding.everywhere,
        "alone": decoding.alone,
    }
    return scopes[request.param]


def pytest_itemcollected(item: pytest.Item) -> None:
    """On a CUDA device the models of this folder are there."""
    if decoding.DEVICE == "cuda":
        item.add_marker("gpu")
