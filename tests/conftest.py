"""Every test starts and ends with nothing patched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import hf_kernel_patch
from hf_kernel_patch import activation, instances
from hf_kernel_patch.settings import PREFIX


@pytest.fixture(autouse=True)
def nothing_left_patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of ours is set, and a patch that a test leaves behind fails it."""
    import os

    for variable in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(variable)
    yield
    left = hf_kernel_patch.status().rows
    stacks = dict(activation.ledger._stacks)
    hf_kernel_patch.unpatch()
    hf_kernel_patch.count_calls(False)
    assert not left, f"left patched: {left}"
    assert not instances.applications
    assert not stacks
