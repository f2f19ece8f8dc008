"""Where Triton kernels are tested: on the GPU, or without one under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
pytest.importorskip("triton")

DEVICE = "cuda" if GPU else "cpu"
#: For ``pytestmark``: ``pytest -m gpu`` selects what runs on the GPU.
MARKS = [pytest.mark.gpu] if GPU else []
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


def here(kernel: Any) -> Any:
    """A Triton kernel that runs on the device of the tests; it is not registered."""
    return type(
        kernel.__name__, (kernel,), {"device": DEVICE, "check_deps": classmethod(lambda cls: None)}
    )
