"""Linear layers of few rows in Triton: sizes, strides, dtypes, several weights, gated products."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.decode_linear import reference
from tests.support.ops.checks import BF16, F16, F32, F64, draw
from tests.support.ops.interpreted import DEVICE, GPU, MARKS, needs_gpu
from tests.support.tiny import error

pytestmark = MARKS
ours = pytest.importorskip("hf_kernel_patch.ops.decode_linear.triton")
#: Half of a last digit of each dtype, for a single number; the interpreter truncates to bfloat16.
LIMITS = {F32: 2e-6, F16: 6e-4, BF16: 4e-3 if GPU else 8e-3}
#: The interpreter has bfloat16 only where tl.dot is not needed.
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)


def tensors(
    rows: int, k: int, ns: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    """x, weights, and biases for every second weight."""
    if dtype is BF16 and rows > 4 and not GPU:
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    drawn = {"dtype": dtype, "grad": False, "device": DEVICE}
    x = draw((rows, k), seed=1, **drawn)
    weights = [draw((n, k), seed=2 + i, **drawn) for i, n in enumerate(ns)]
    biases = [draw((n,), seed=12 + i, **drawn) if i % 2 else None for i, n in enumerate(ns)]
    return x, weights, biases


def check(x: Any, weights: Any, biases: Any) -> None:
    found = ours.linears(x, weights, biases)
    for out, wide in zip(found, reference.linears(*_wide(x, weights, biases)), strict=True):
        assert out.dtype == x.dtype and out.is_contiguous() and out.shape == wide.shape
        assert error(out, wide) < LIMITS[x.dtype]


def _wide(x: Any, weights: Any, biases: Any) -> Any:
    wide = [bias if bias is None else bias.double() for bias in biases]
    return x.double(), [weight.double() for weight in weights], wide, F64


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 16, 31, 32, 33])
def test_rows(rows: int, dtype: torch.dtype) -> None:
    check(*tensors(rows, 136, (37, 5, 16), dtype))


@DTYPES
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("k", [1, 8, 96, 515, 2049, 4096])
def test_lengths(k: int, rows: int, dtype: torch.dtype) -> None:
    check(*tensors(rows, k, (3, 1), dtype))


@pytest.mark.parametrize("count", range(1, 9))
def test_as_many_weights_as_there_may_be(count: int) -> None:
    check(*tensors(1, 64, tuple(range(1, 18, 2))[:count], F32))


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_strides(rows: int) -> None:
    x, weights, biases = tensors(rows, 72, (5, 11), F16)
    columns = torch.stack([x, x], -1)[..., 0]
    halves = torch.cat([x, x], -1)[..., 72:]
    wide = [torch.cat([weight, weight], 1)[:, :72] for weight in weights]
    whole = ours.linears(x, weights, biases)
    for strided in (columns, halves, x[None, :, None]):
        for kind in (weights, wide):
            found = ours.linears(strided, kind, biases)
            for a, b in zip(whole, found, strict=True):
                assert error(b.view_as(a), a) < LIMITS[F16]
    assert found[0].shape == (1, rows, 1, 5)


@pytest.mark.parametrize("offset", [1, 4])
def test_tensors_that_start_anywhere(offset: int) -> None:
    x, (weight,), _ = tensors(1, 64, (6,), F16)
    moved = torch.cat([weight.new_zeros(offset), weight.flatten()])[offset:].view(6, 64)
    shifted = torch.cat([x.new_zeros(1, offset), x], 1)[:, offset:]
    check(shifted, [moved, weight], [None, None])


@DTYPES
@pytest.mark.parametrize(("rows", "activation"), [(1, "silu"), (3, "gelu"), (7, "gelu_tanh")])
def test_gated(rows: int, activation: str, dtype: torch.dtype) -> None:
    x, weights, biases = tensors(rows, 136, (19, 19), dtype)
    for given in (biases, [None, None]):
        found = ours.gated(x, *weights, activation, *given)
        wide_x, wide_weights, wide_biases, _ = _wide(x, weights, given)
        wide = reference.gated(wide_x, *wide_weights, activation, *wide_biases, F64)
        for out, wanted, limit in zip(found, wide, (1, 1, 3), strict=True):
            assert error(out, wanted) < limit * LIMITS[dtype]


def test_gated_rounds_where_the_layers_do() -> None:
    x, weights, _ = tensors(2, 136, (19, 19), F16)
    gate, up, product = ours.gated(x, *weights, "silu")
    activated = torch.nn.functional.silu(gate)
    # Another exponential function tips a last digit here and there.
    assert (activated * up != product).float().mean() < 0.05


def test_what_pays() -> None:
    assert ours.pays(1, 2048, (2048, 512, 512), BF16)
    assert ours.pays(32, 4096, (4096,), F16)
    assert not ours.pays(33, 4096, (4096,), BF16)
    assert not ours.pays(8, 8192, (2048,), BF16)
    assert ours.pays(4, 2048, (128,), BF16)
    assert not ours.pays(2, 4096, (4096,), F32)
    assert not ours.pays(1, 64, (8,) * 9, BF16)
    assert not ours.pays(1, 64, (8,), F64)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 4, 8, 32])
def test_a_cuda_graph_replays_launches_that_start_early(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights, _ = tensors(rows, 512, (512,) * 8, BF16)
    weights = [weight / 20 for weight in weights]

    def chain() -> torch.Tensor:
        """Each launch needs what the one before has just written."""
        out = x
        for weight in weights:
            (out,) = ours.linears(out, [weight], [None])
            out, _, product = ours.gated(out, weight, weight)
            out = (product + 1) if weight is weights[3] else out + 0 * product
        return out

    x.normal_()
    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    monkeypatch.setattr(ours, "has_early_launch", lambda device: False)
    for _ in range(20):
        x.normal_()
        graph.replay()
        assert torch.equal(found, chain())


@needs_gpu
def test_offsets_beyond_31_bits() -> None:
    k, n = 16_384, (1 << 31) // 16_384 + 5
    weight = torch.zeros(n, k, dtype=F16, device=DEVICE)
    weight[-3:] = torch.randn(3, k, device=DEVICE)
    x = torch.randn(1, k, device=DEVICE).half()
    (found,) = ours.linears(x, [weight], [None])
    assert error(found[:, -3:], x.double() @ weight[-3:].double().t()) < LIMITS[F16]
    assert not found[:, :-3].any()
