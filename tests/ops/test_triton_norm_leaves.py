"""Norms of transformers by the Triton kernels of rms_norm, in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_kernel_patch import registry
from hf_kernel_patch.ops.rms_norm import CudaFusedRMSNorm
from tests.support.norm_originals import EACH, F32, inputs, outcome, patched
from tests.support.ops.interpreted import DEVICE, MARKS, here
from tests.support.probes import fallbacks, served
from tests.support.tiny import error

pytestmark = MARKS
F16 = torch.float16


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    one = here(CudaFusedRMSNorm)
    one.kernel_id = "rms_norm_here"
    monkeypatch.setitem(registry.kernels(), one.kernel_id, one)
    torch._dynamo.reset()
    yield one.kernel_id
    torch._dynamo.reset()


CASES = [(name, F32, F32) for name in EACH]
CASES += [(name, F32, F16) for name, one in EACH.items() if one.leaf == "rms_norm.t5"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "dtype", "weight"), CASES)
def test_served_forward_and_backward(
    name: str, dtype: torch.dtype, weight: torch.dtype, compiled: bool, kernel: str
) -> None:
    one = EACH[name]
    norm = one.made(weight).to(DEVICE)
    given = [x.detach().to(DEVICE).requires_grad_() for x in inputs(one, dtype)]
    eager = outcome(norm, given)
    with patched(one, kernel) as report:
        function: Any = (
            torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
        )
        found = outcome(function, given)
    assert not fallbacks(report)
    assert served(report)
    for ours, theirs in zip(found, eager, strict=True):
        assert ours.dtype == theirs.dtype
        assert error(ours, theirs) < (2e-6 if weight is F32 else 2e-3)
