"""The tests here count calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import hf_kernel_patch


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    """Calls are counted."""
    hf_kernel_patch.count_calls()
    yield
    hf_kernel_patch.count_calls(False)
