"""The tests here count calls; some look at logits that are computed when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import hf_kernel_patch
from hf_kernel_patch.recognition.rules.head_loss.logits import Logits
from tests.support.tiny import tiny_model, tokens


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    """Calls are counted."""
    hf_kernel_patch.count_calls()
    yield
    hf_kernel_patch.count_calls(False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry for every time that logits are computed."""
    found: list[bool] = []
    make = Logits.make

    def counted(self: Any) -> Any:
        found.append(True)
        return make(self)

    monkeypatch.setattr(Logits, "make", counted)
    return found


@pytest.fixture
def pair(made: list[bool]) -> Iterator[tuple[Any, Any]]:
    """(patched, eager) outputs of one training step."""
    model = tiny_model("llama").train()
    eager = model(tokens(), labels=tokens())
    with hf_kernel_patch.patched("linear_cross_entropy", models="llama", strict=True):
        yield model(tokens(), labels=tokens()), eager
