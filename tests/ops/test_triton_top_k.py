"""The largest of few rows: as torch.topk, but for the order of equals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.ops.interpreted import DEVICE, MARKS

pytestmark = MARKS


def top_k(x: torch.Tensor, k: int) -> Any:
    from hf_kernel_patch.ops.top_k import triton

    assert triton.fits(x, k)
    return triton.top_k(x, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "k"), [((1, 128), 8), ((3, 60), 4), ((2, 3, 5), 5), ((4, 1), 1)])
def test_as_torch(shape: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    n = shape[-1]
    rows = [torch.randperm(4 * n)[:n] for _ in range(torch.Size(shape[:-1]).numel())]
    x = (torch.stack(rows).reshape(shape) - 2 * n).to(dtype).to(DEVICE)  # no two are equal
    values, indices = top_k(x, k)
    expected = torch.topk(x, k)
    assert torch.equal(values, expected.values) and torch.equal(indices, expected.indices)
    assert values.dtype == dtype and indices.dtype == torch.int64


def test_strides_equals_and_what_is_no_number() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, -torch.inf]], device=DEVICE)
    values, indices = top_k(x.expand(2, 5), 5)
    assert values[0].tolist() == [3.0, 3.0, 1.0, -torch.inf, -torch.inf]
    assert indices.tolist() == [[1, 2, 0, 3, 4]] * 2, "each once, the first of equals first"
    x = torch.randn(6, 4, device=DEVICE).T
    assert torch.equal(top_k(x, 2)[1], torch.topk(x, 2).indices)
    x = torch.tensor([[0.0, torch.nan, torch.inf, 1.0]], device=DEVICE)
    values, indices = top_k(x, 2)
    assert indices.tolist() == [[1, 2]] and values[0, 0].isnan() and values[0, 1].isinf()


def test_what_it_leaves_to_torch() -> None:
    from hf_kernel_patch.ops.top_k import triton
    from hf_kernel_patch.recognition.rules.decoding import top_k as mode

    x = torch.randn(2, 600, device=DEVICE)
    assert not triton.fits(x, 2) and not triton.fits(x[:, :8], 9) and not triton.fits(x.long(), 2)
    assert mode._plain((x, 2), {}) == (x, 2)
    assert mode._plain((x, 2), {"dim": -1, "sorted": False}) == (x, 2)
    assert mode._plain((x, 2, 0), {}) is None
    assert mode._plain((x,), {"k": 2, "largest": False}) is None
    assert mode._plain((x,), {"k": torch.tensor(2)}) is None
    run = mode.choosing()(lambda: (torch.topk(x, 3), x.topk(2, dim=0), x[:, :9].topk(3)))
    for found, expected in zip(run(), (torch.topk(x, 3), x.topk(2, dim=0), x[:, :9].topk(3))):
        assert torch.equal(found.values, expected.values)
        assert torch.equal(found.indices, expected.indices)
