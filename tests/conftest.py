"""Every test starts and ends with nothing patched."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch.patching import model_patch
from hf_kernel_patch.patching.ledger import ledger
from hf_kernel_patch.settings import PREFIX

PRECISION = "ACCELERATE_MIXED_PRECISION"

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run under its interpreter; read when triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


#: The second is found by itself where the package is installed. A patch that a test leaves behind
#: fails it: setup.cfg has the option.
pytest_plugins = ["pytester", "hf_kernel_patch_pytest"]


@pytest.fixture(autouse=True)
def precision_of_its_own() -> Iterator[None]:
    """A test's training does not choose the precision of the next one's.

    ``TrainingArguments(bf16=True)`` of transformers 4 does, by a variable that it leaves set.
    """
    before = os.environ.get(PRECISION)
    yield
    os.environ.pop(PRECISION, None)
    if before is not None:
        os.environ[PRECISION] = before


@pytest.fixture(autouse=True)
def nothing_left_patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of ours is set, and nothing stays in the ledger where no patch is in force."""
    for variable in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(variable)
    yield
    hf_kernel_patch.count_calls(False)
    if not hf_kernel_patch.status().rows:
        stacks = dict(ledger._stacks)
        hf_kernel_patch.unpatch()
        assert not model_patch.applications
        assert not stacks
