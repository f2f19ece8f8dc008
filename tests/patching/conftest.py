"""What several tests of patches need."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

import hf_kernel_patch
from tests.support.tiny import modelling


@pytest.fixture
def not_imported() -> Iterator[None]:
    """Takes the module of SmolLM3 out of ``sys.modules`` for the test, as if it were new."""
    module = modelling("smollm3")
    package = sys.modules[module.__package__]
    del sys.modules[module.__name__]
    yield
    hf_kernel_patch.unpatch()
    sys.modules[module.__name__] = module
    package.modeling_smollm3 = module
