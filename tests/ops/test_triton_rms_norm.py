"""rms_norm, also gated, and add_rms_norm in Triton: values, strides, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_kernel_patch.ops._shared.probe import probe
from hf_kernel_patch.ops.rms_norm import CudaFusedRMSNorm
from tests.ops.triton_norms import (
    ADD,
    EACH,
    EPS,
    FUNCTIONS,
    NORM,
    RMS_NORM,
    flat,
    operands,
    outcome,
)
from tests.support.ops import cases_add_rms_norm, cases_rms_norm
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    Case,
    check_backend,
    check_double_backward,
    check_saves_nothing,
    draw,
)
from tests.support.ops.interpreted import DEVICE, GPU, MARKS, needs_gpu
from tests.support.tiny import error

pytestmark = MARKS
#: The interpreter takes bf16 for integers and truncates, and is slow.
CASES = [
    (kernel, case)
    for kernel, cases in ((NORM, cases_rms_norm.CASES), (ADD, cases_add_rms_norm.CASES))
    for case in cases
    if GPU or ("bf16" not in case.name and "96x512" not in case.name)
]
PLAIN = [
    *((NORM, case) for case in cases_rms_norm.PLAIN),
    *((ADD, case) for case in cases_add_rms_norm.PLAIN),
]


def shown(value: Any) -> str:
    return str(getattr(value, "op", value)) if isinstance(value, type) else str(value)


def furthest(name: str, inputs: list[torch.Tensor], layout: str = "contiguous") -> float:
    """The largest error of outputs and gradients against the reference in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    function, truth, _ = FUNCTIONS[name]
    found, right = outcome(function, inputs, layout), outcome(truth, wide, layout)
    assert [a.shape for a in found] == [b.shape for b in right]
    return max(error(a.detach(), b.detach()) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize(("kernel", "case"), CASES, ids=shown)
def test_no_further_from_the_truth_than_hugging_face(kernel: Any, case: Case) -> None:
    check_backend(kernel, case)


@pytest.mark.parametrize("check", [check_double_backward, check_saves_nothing])
@pytest.mark.parametrize(("kernel", "case"), PLAIN, ids=shown)
def test_autograd_holds(check: Callable[..., None], kernel: Any, case: Case) -> None:
    check(kernel, case)


@EACH
@pytest.mark.parametrize(
    ("dtype", "layouts"),
    [
        (F32, ("contiguous", "contiguous")),
        (F32, ("heads", "heads")),
        (F32, ("heads", "half")),
        (F32, ("half", "contiguous")),
        (F32, ("contiguous", "sliced")),
        (F32, ("transposed", "expanded")),
        (F16, ("heads", "contiguous")),
        (BF16, ("half", "heads")),
    ],
)
def test_any_strides_of_inputs_and_gradients(
    name: str, dtype: torch.dtype, layouts: tuple[str, str]
) -> None:
    inputs = operands(name, (2, 3, 4, 24), dtype, layouts)
    limit = {F32: 1e-6, F16: 1e-3, BF16: 8e-3 if GPU else 2e-2}[dtype]
    for layout in ("contiguous", "heads", "expanded"):
        assert furthest(name, inputs, layout) < limit
    assert flat(FUNCTIONS[name][0](*inputs))[0].stride() == torch.empty_like(inputs[0]).stride()


@EACH
def test_a_weight_with_gaps(name: str) -> None:
    *inputs, _ = operands(name)
    weight = draw((24,), seed=9, layout="sliced", device=DEVICE)
    assert not weight.is_contiguous()
    assert furthest(name, [*inputs, weight]) < 1e-6


@EACH
@pytest.mark.parametrize("width", [2, 7, 16, 64, 100, 128, 256, 896])
def test_widths(name: str, width: int) -> None:
    assert furthest(name, operands(name, (3, width))) < 2e-6


@EACH
def test_more_rows_than_all_programs_take_at_once(name: str) -> None:
    assert furthest(name, operands(name, (1234, 64))) < 2e-6


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows are too wide for registers from 33 elements in the backward, from 49 in the forward."""
    from hf_kernel_patch.ops._shared.rows import norm as rows
    from hf_kernel_patch.ops.add_rms_norm import triton as add
    from hf_kernel_patch.ops.rms_norm import triton as norm

    caches = rows._prepare_forward, rows._prepare_backward
    for module, attribute, value in (
        (rows, "WIDEST", 48),
        *((module, "WIDEST_BACKWARD", 32) for module in (rows, norm, add)),
        (rows, "_WIDE_BLOCK", 16),
        (rows, "_WIDE_WARPS", 4),
    ):
        monkeypatch.setattr(module, attribute, value)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("narrow")
@EACH
@pytest.mark.parametrize("width", [32, 40, 64, 71])
@pytest.mark.parametrize("layout", ["contiguous", "half", "sliced"])
def test_rows_too_wide_for_registers(name: str, width: int, layout: str) -> None:
    assert furthest(name, operands(name, (9, width), layouts=(layout, "contiguous"))) < 2e-6


@needs_gpu
@pytest.mark.parametrize("width", [2048, 5120, 8192, 8200, 16384, 40000, 65536])
def test_wide_rows(width: int) -> None:
    for name in FUNCTIONS:
        assert furthest(name, operands(name, (40, width))) < 2e-6


def test_without_eps_only_rows_of_zeros_are_nan() -> None:
    x = torch.full((3, 16), 2.0, device=DEVICE)
    x[1] = 0.0
    x.requires_grad_()
    weight = torch.ones(16, device=DEVICE, requires_grad=True)
    found = RMS_NORM(x[::2], weight, 0.0)
    assert torch.equal(found, torch.ones_like(found))
    (grad,) = torch.autograd.grad(found.sum(), weight)
    assert torch.equal(grad, torch.full_like(grad, 2.0))
    assert RMS_NORM(x, weight, 0.0)[1].isnan().all()


def test_the_gate_is_silu() -> None:
    x, gate, weight = operands("rms_norm_gated", grad=False)
    plain = RMS_NORM(x, weight, EPS)
    assert error(RMS_NORM(x, weight, EPS, gate=gate), plain * F.silu(gate)) < 1e-6


def test_the_blocks_depend_on_the_width_and_the_device_alone() -> None:
    from hf_kernel_patch.ops._shared.rows import norm

    for width in (1, 64, 128, 896, 2048, 5120, 8192):
        block = norm.power(width)
        rows, warps, *_ = norm.forward_blocks(width)
        assert rows * block <= 32 * 32 * warps
        for memory in (48 << 10, 99 << 10, 227 << 10):
            rows, warps, stages, programs_per_sm = norm.backward_blocks(width, 6, memory)
            assert (stages - 1) * rows * block * 6 <= memory
            assert programs_per_sm * warps <= 16


def test_refuses_a_weight_of_another_width_and_a_residual_of_another_shape() -> None:
    x, residual, weight = operands("add_rms_norm")
    assert NORM.why_fallback(x, weight, EPS) is None
    assert "weight" in str(NORM.why_fallback(x, weight[:1], EPS))
    assert ADD.why_fallback(x, residual, weight, EPS) is None
    assert "residual" in str(ADD.why_fallback(x, residual[:1], weight, EPS))
    assert "weight" in str(ADD.why_fallback(x, residual, weight[:1], EPS))


def test_the_probe_runs_a_kernel_or_says_why_not() -> None:
    assert probe(DEVICE) is None
    if not GPU:  # there, a launch on no memory would break the device for all later tests
        assert "cannot run a kernel" in str(probe("meta"))
        assert CudaFusedRMSNorm.check_deps() == probe("cuda") is not None
