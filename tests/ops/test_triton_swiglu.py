"""swiglu in Triton: rows and strides, autograd, compilation, large offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.swiglu import CudaFusedSwiGLU
from hf_kernel_patch.ops.swiglu.reference import swiglu as reference
from tests.support.ops import cases_swiglu
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
from tests.support.ops.interpreted import DEVICE, GPU, MARKS, here, needs_gpu
from tests.support.tiny import error

pytestmark = MARKS
SWIGLU = here(CudaFusedSwiGLU)
ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
#: The interpreter truncates to bf16; Phi3 and Qwen2 have the activations of the others.
CASES = [
    case
    for case in cases_swiglu.CASES
    if (GPU or "bf16" not in case.name) and not case.name.startswith(("Phi3", "Qwen2"))
]


@pytest.fixture(autouse=True)
def every_size_is_for_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = pytest.importorskip("hf_kernel_patch.ops.swiglu.triton")
    monkeypatch.setattr(module, "SMALL", -1)
    yield


def halves(shape: tuple[int, ...], dtype: torch.dtype = F32) -> tuple[torch.Tensor, ...]:
    """A joint projection that needs a gradient, then gate and up, its halves."""
    joint = draw((*shape[:-1], 2 * shape[-1]), dtype, scale=3.0, device=DEVICE)
    return joint, *joint.chunk(2, -1)


def check(gate: torch.Tensor, up: torch.Tensor, leaf: torch.Tensor, activation: str) -> None:
    """Outputs and gradients against float64."""
    found = SWIGLU.load()(gate, up, activation)
    wide = reference(gate.double(), up.double(), activation, torch.float64)
    upstream = draw(tuple(found.shape), found.dtype, seed=5, grad=False, device=DEVICE)
    assert error(found.detach(), wide.detach()) < 2e-7
    ours, theirs = (torch.autograd.grad(out, leaf, upstream.to(out.dtype)) for out in (found, wide))
    assert error(ours[0], theirs[0]) < 3e-7


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_further_from_the_truth_than_hugging_face(case: Case) -> None:
    check_backend(SWIGLU, case)


@pytest.mark.parametrize("holds", [check_double_backward, check_saves_nothing])
@ACTIVATIONS
def test_autograd_holds(holds: Callable[..., None], activation: str) -> None:
    flavours = {"silu": "LlamaMLP", "gelu_tanh": "GemmaMLP", "gelu": "MistralMLP"}
    flavour = flavours[activation]
    holds(SWIGLU, cases_swiglu.case(flavour, (3, 7, 61)))


@ACTIVATIONS
@pytest.mark.parametrize("shape", [(3, 7, 40), (2, 3, 97), (5, 1368), (1, 3000), (2, 1, 1, 8)])
def test_halves_of_one_tensor(shape: tuple[int, ...], activation: str) -> None:
    joint, gate, up = halves(shape)
    check(gate, up, joint, activation)


def test_rows_that_no_single_stride_reaches_are_copied() -> None:
    base = draw((3, 5, 4, 16), device=DEVICE)
    gate = up = base[:, 1:4]
    check(gate, up, base, "silu")
    check(base.transpose(0, 1), base.transpose(0, 1), base, "silu")


@ACTIVATIONS
def test_bf16_rounds_where_the_original_does(activation: str) -> None:
    _, gate, up = (x.detach() for x in halves((3, 7, 64), BF16))
    wide = reference(gate.double(), up.double(), activation, torch.float64)
    assert error(SWIGLU.load()(gate, up, activation), wide) < (5e-3 if GPU else 1e-2)


@ACTIVATIONS
def test_few_elements_take_the_kernels_of_pytorch(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("hf_kernel_patch.ops.swiglu.triton")
    _, gate, up = (x.detach() for x in halves((3, 64), F16))
    launched = SWIGLU.load()(gate, up, activation)
    monkeypatch.setattr(module, "SMALL", gate.numel())
    monkeypatch.setattr(module, "_launch", None)
    found = SWIGLU.load()(gate, up, activation)
    # Roundings are at the same places: what differs is a last digit that another tanh tips, or the
    # erf of PyTorch on a CPU, which is no more precise than that far from zero.
    assert (found != launched).float().mean() < (0.1 if activation == "gelu" else 0.05)
    assert error(found, launched) < 1e-4


def test_another_token_count_asks_for_no_other_kernel() -> None:
    module = pytest.importorskip("hf_kernel_patch.ops.swiglu.triton")
    for tokens in (3, 1, 8, 17):
        joint, gate, up = halves((tokens, 48))
        SWIGLU.load()(gate, up, "silu").sum().backward()
        SWIGLU.load()(joint, joint, "silu").sum().backward()
        if tokens == 3:
            before = module._launcher.cache_info().currsize
    assert module._launcher.cache_info().currsize == before


@ACTIVATIONS
def test_compiles_as_one_graph_whatever_the_token_count(activation: str) -> None:
    torch._dynamo.reset()
    function = torch.compile(SWIGLU.load(), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5):
        joint, gate, up = halves((tokens, 24))
        found, plain = (f(gate, up, activation) for f in (function, SWIGLU.load()))
        assert torch.equal(found, plain)
        grads = [torch.autograd.grad(out.sum(), joint, retain_graph=True) for out in (found, plain)]
        assert torch.equal(grads[0][0], grads[1][0])


def test_opcheck() -> None:
    _, gate, up = halves((3, 24))
    SWIGLU.load()
    operator = torch.ops.hf_kernel_patch.swiglu.default
    leaves = (x.detach().requires_grad_() for x in (gate, up))
    torch.library.opcheck(operator, (*leaves, "silu"))


@pytest.mark.parametrize(
    "change", [lambda x: x.half(), lambda x: x[..., 1:], lambda x: x.to("meta")]
)
def test_refuses_another_dtype_shape_or_device(change: Callable[..., Any]) -> None:
    gate = draw((3, 8), grad=False, device=DEVICE)
    assert SWIGLU.why_fallback(gate, gate, "silu") is None
    assert "differ" in str(SWIGLU.why_fallback(gate, change(gate), "silu"))


@needs_gpu
@ACTIVATIONS
@pytest.mark.parametrize("joint", [False, True])
def test_offsets_beyond_31_bits(activation: str, joint: bool) -> None:
    rows, width = 131_080, 16_384 // (2 if joint else 1)
    storage = torch.empty(rows, 16_384, dtype=BF16, device=DEVICE)
    assert storage.numel() > 1 << 31
    storage.fill_(0.5)
    last = torch.randn(3, 16_384, device=DEVICE).to(BF16)
    storage[-3:] = last
    gate, up = storage.chunk(2, -1) if joint else (storage, storage)
    found = SWIGLU.load()(gate, up, activation)
    assert found.shape == (rows, width)
    assert torch.equal(found[-3:], SWIGLU.load()(gate[-3:], up[-3:], activation))


@needs_gpu
def test_a_cuda_graph_replays_it() -> None:
    _, gate, up = (x.detach() for x in halves((7, 64), BF16))
    wanted = SWIGLU.load()(2 * gate, up, "silu")
    SWIGLU.load()(gate, up, "silu")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = SWIGLU.load()(gate, up, "silu")
    gate.mul_(2)
    graph.replay()
    assert torch.equal(found, wanted)
