"""rms_norm, also gated, and add_rms_norm in Triton: autograd, compilation, the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.ops.triton_norms import EACH, EPS, FUNCTIONS, RMS_NORM, flat, operands, outcome
from tests.support.ops.checks import BF16, F16, draw
from tests.support.ops.interpreted import DEVICE, MARKS, needs_gpu
from tests.support.tiny import error

pytestmark = MARKS
#: name -> the operator that torch.compile sees, and its last arguments.
OPERATORS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "rms_norm": ("rms_norm", ()),
    "add_rms_norm": ("add_rms_norm", ()),
    "rms_norm_gated": ("rms_norm", ()),
    "rms_norm_in_groups": ("rms_norm_extras", (12, False, "silu", False, False)),
    "rms_norm_sigmoid": ("rms_norm_extras", (None, True, "sigmoid", False, False)),
}


@EACH
def test_gradients_are_the_same_bits_each_time(name: str) -> None:
    inputs = operands(name, (300, 64))
    first, second = (outcome(FUNCTIONS[name][0], inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@EACH
def test_another_token_count_asks_for_no_other_kernel(name: str) -> None:
    from hf_kernel_patch.ops._shared.rows import norm
    from hf_kernel_patch.ops.rms_norm import triton_extras_launch

    caches = (
        *(norm._prepare_forward, norm._prepare_backward, norm._sum_launcher),
        *(triton_extras_launch._prepare_forward, triton_extras_launch._prepare_backward),
    )
    counts = []
    for tokens in (3, 1, 2, 16):
        outcome(FUNCTIONS[name][0], operands(name, (tokens, 24)))
        counts.append([cached.cache_info().currsize for cached in caches])
    assert all(count == counts[0] for count in counts)


@EACH
def test_saves_nothing_but_inputs_and_the_sum(name: str) -> None:
    kept: list[torch.Tensor] = []
    inputs = operands(name)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        outputs = flat(FUNCTIONS[name][0](*inputs))
    known = [outputs[0], inputs[-1]] if name == "add_rms_norm" else inputs
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in known}


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_outputs_of_add_rms_norm_is_enough(which: int) -> None:
    function, truth, _ = FUNCTIONS["add_rms_norm"]
    inputs = operands("add_rms_norm")[: 3 - (which == 0)]
    weight = operands("add_rms_norm")[-1]
    given = (weight,) if which == 0 else ()
    upstream = draw((5, 24), seed=3, grad=False, device=DEVICE)
    found, right = (
        torch.autograd.grad(f(*inputs, *given)[which], inputs, upstream) for f in (function, truth)
    )
    assert max(map(error, found, right)) < 1e-6


def test_one_tensor_may_be_x_and_the_residual() -> None:
    x, _, weight = operands("add_rms_norm")
    found, right = (
        outcome(lambda x, weight, f=f: f(x, x, weight), [x, weight])
        for f in FUNCTIONS["add_rms_norm"][:2]
    )
    assert max(map(error, found, right)) < 1e-6


def test_a_frozen_weight_costs_no_gradient_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_kernel_patch.ops._shared.rows import norm

    x, weight = operands("rms_norm")
    wanted = outcome(FUNCTIONS["rms_norm"][0], [x, weight])[1]
    monkeypatch.setattr(norm, "_sum_launcher", None)
    function = lambda x: RMS_NORM(x, weight.detach(), EPS)  # noqa: E731
    assert torch.equal(outcome(function, [x])[1], wanted)


@EACH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name: str, reentrant: bool) -> None:
    function = FUNCTIONS[name][0]
    plain = outcome(function, operands(name))
    inputs = operands(name)
    outputs = flat(checkpoint(function, *inputs, use_reentrant=reentrant))
    upstream = [
        draw(tuple(out.shape), seed=7 + i, grad=False, device=DEVICE)
        for i, out in enumerate(outputs)
    ]
    torch.autograd.backward(outputs, upstream)
    assert all(map(torch.equal, [*outputs, *(x.grad for x in inputs)], plain))


@EACH
def test_compiles_as_one_graph_whatever_the_token_count(name: str) -> None:
    torch._dynamo.reset()
    function = FUNCTIONS[name][0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 24), (5, 24)):
        inputs = operands(name, shape)
        found, plain = outcome(compiled, inputs), outcome(function, inputs)
        assert all(map(torch.equal, found, plain))
        assert [x.stride() for x in found] == [x.stride() for x in plain]


@EACH
def test_exports(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> Any:
            return FUNCTIONS[name][0](*inputs)

    inputs = tuple(operands(name, grad=False))
    program = torch.export.export(Module(), inputs)
    assert f"hf_kernel_patch.{OPERATORS[name][0]}." in str(program.graph)
    for found, plain in zip(flat(program.module()(*inputs)), flat(FUNCTIONS[name][0](*inputs))):
        assert torch.equal(found, plain)


@EACH
@pytest.mark.parametrize("layout", ["contiguous", "heads", "sliced"])
def test_opcheck(name: str, layout: str) -> None:
    *inputs, weight = operands(name, (2, 3, 4, 24), F16, (layout, "contiguous"))
    operator, extras = OPERATORS[name]
    if name == "add_rms_norm":
        given = (*inputs, weight)
    else:
        given = (inputs[0], weight, *(inputs[1:] or [None]))
    function = getattr(torch.ops.hf_kernel_patch, operator).default
    torch.library.opcheck(function, (*given, EPS, 0.0, True, *extras))


def test_opcheck_without_a_weight() -> None:
    function = torch.ops.hf_kernel_patch.rms_norm_extras.default
    x = operands("rms_norm", (2, 3, 24))[0]
    torch.library.opcheck(
        function, (x, None, None, EPS, 0.0, True, None, True, "silu", False, True)
    )


@needs_gpu
@EACH
def test_offsets_beyond_31_bits(name: str) -> None:
    inputs = operands(name, (3, 64), BF16, grad=False)
    far = torch.empty((1 << 31) + 4096, dtype=BF16, device=DEVICE).as_strided((3, 64), (1 << 30, 1))
    far.copy_(inputs[0])
    function = FUNCTIONS[name][0]
    assert all(map(torch.equal, flat(function(far, *inputs[1:])), flat(function(*inputs))))


@needs_gpu
@EACH
def test_a_cuda_graph_replays_it(name: str) -> None:
    inputs, other = (operands(name, (7, 128), BF16, grad=False) for _ in range(2))
    other[0].mul_(2.0).add_(1.0)
    function = FUNCTIONS[name][0]
    wanted = flat(function(*other))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = flat(function(*inputs))
    inputs[0].copy_(other[0])
    graph.replay()
    assert all(map(torch.equal, found, wanted))


@needs_gpu
@EACH
def test_pointers_that_are_not_multiples_of_16(name: str) -> None:
    inputs = operands(name, (7, 128), BF16, grad=False)
    function = FUNCTIONS[name][0]
    wanted = flat(function(*inputs))
    for i, x in enumerate(inputs):
        moved = torch.empty(x.numel() + 1, dtype=BF16, device=DEVICE)[1:].view(x.shape).copy_(x)
        given = [*inputs[:i], moved, *inputs[i + 1 :]]
        for _ in range(2):
            assert all(map(torch.equal, flat(function(*given)), wanted))


@needs_gpu
def test_runs_on_the_current_stream() -> None:
    x, weight = torch.zeros(64, 128, device=DEVICE), torch.ones(128, device=DEVICE)
    RMS_NORM(x, weight, 0.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(2.0)
        found = RMS_NORM(x, weight, 0.0)
    stream.synchronize()
    assert torch.equal(found, torch.ones_like(found))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@EACH
def test_launches_on_the_tensors_device(name: str) -> None:
    inputs = operands(name)
    there = [x.detach().to("cuda:1").requires_grad_() for x in inputs]
    function = FUNCTIONS[name][0]
    for _ in range(2):
        found = flat(function(*there))
        assert found[0].device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
    for ours, theirs in zip(found, flat(function(*inputs)), strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu())
