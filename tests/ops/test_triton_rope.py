"""rope and qk_norm_rope in Triton: layouts of q and k, autograd, compilation, large offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_kernel_patch.ops.qk_norm_rope import CudaFusedQKNormRoPE
from hf_kernel_patch.ops.qk_norm_rope.reference import qk_norm_rope as normed_reference
from hf_kernel_patch.ops.rope import CudaFusedRoPE
from hf_kernel_patch.ops.rope.reference import rope as rope_reference
from tests.support.ops import cases_qk_norm_rope, cases_rope
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    F64,
    Case,
    check_backend,
    check_double_backward,
    check_saves_nothing,
    draw,
)
from tests.support.ops.interpreted import DEVICE, GPU, MARKS, here, needs_gpu
from tests.support.tiny import error

pytestmark = MARKS
ROPE, NORMED = here(CudaFusedRoPE), here(CudaFusedQKNormRoPE)
KERNELS = pytest.mark.parametrize("kernel", [ROPE, NORMED], ids=lambda kernel: kernel.op)
PARTIAL = {
    ROPE: cases_rope.case("phi3", length=2),
    NORMED: cases_qk_norm_rope.case("partial", length=2),
}
#: Too many programs for the interpreter.
LONG = () if GPU else ("many tokens", "prime sizes")
STRIDED = ("as attention lays q out", "every second element", "cos of every sequence")
#: The interpreter takes bf16 for integers and truncates; what is nearer is for the GPU to show.
HALF = BF16 if GPU else F16
SHORT = {} if GPU else {"length": 3}
CASES = [
    *((ROPE, cases_rope.case("llama", (dtype, dtype), **SHORT)) for dtype in (F32, HALF)),
    *((ROPE, cases_rope.case("olmo2", dtypes, **SHORT)) for dtypes in ((F16, F32), (F32, F16))),
    *(
        (ROPE, cases_rope.case(flavour, (dtype, dtype), **SHORT))
        for flavour in ("gpt_oss", *cases_rope.PAIRS)
        for dtype in (F32, HALF)
    ),
    *(
        (ROPE, cases_rope.case("glm", dtypes, **SHORT))
        for dtypes in ((F16, F16, F32), (F16, F32, F16), (F32, F16, F16))
    ),
    *(
        (ROPE, cases_rope.case(flavour, name=name, **{**SHORT, **cases_rope.OPTIONS[name]}))
        for flavour in ("glm", "deepseek_v3")
        for name in STRIDED
    ),
    *(
        (ROPE, cases_rope.case("phi3", name=name, **{**SHORT, **options}))
        for name, options in cases_rope.OPTIONS.items()
        if name not in LONG
    ),
    *((NORMED, cases_qk_norm_rope.case("qwen3", (dtype,) * 3, **SHORT)) for dtype in (F32, HALF)),
    (NORMED, cases_qk_norm_rope.case("gemma", (HALF, F32, HALF), **SHORT)),
    *(
        (NORMED, cases_qk_norm_rope.case("partial", name=name, **{**SHORT, **options}))
        for name, options in cases_qk_norm_rope.OPTIONS.items()
        if name not in LONG
    ),
]


def operands(
    kernel: Any,
    heads: tuple[int, int] = (4, 2),
    size: int = 32,
    *,
    tokens: int = 2,
    width: int | None = None,
    dtype: torch.dtype = F32,
    inner: bool = True,
    grad: bool = True,
) -> tuple[Any, ...]:
    """Positional arguments of the op for two sequences."""
    q, k = (
        draw((2, tokens, count, size), dtype, seed=seed, grad=False, device=DEVICE)
        for seed, count in enumerate(heads)
    )
    cos, sin = (
        draw((2, tokens, width or size), dtype, seed=seed, grad=False, device=DEVICE)
        for seed in (2, 3)
    )
    if kernel is NORMED:
        q_weight, k_weight = (
            draw((size,), dtype, seed=seed, grad=grad, device=DEVICE) for seed in (4, 5)
        )
        return q.requires_grad_(grad), k.requires_grad_(grad), q_weight, k_weight, 1e-6, cos, sin
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if not inner:
        q, k = q.contiguous(), k.contiguous()
    return q.requires_grad_(grad), k.requires_grad_(grad), cos, sin


def truth(kernel: Any, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """The reference in float64."""
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    reference: Any = rope_reference if kernel is ROPE else normed_reference
    return reference(*wide, dtype=F64)


def leaves(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    return [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]


def gradients(outputs: Any, inputs: Any) -> tuple[torch.Tensor, ...]:
    """Of the inputs, for random incoming gradients; the same at every call."""
    upstream = [
        draw(tuple(out.shape), out.dtype, seed=7 + i, grad=False, device=DEVICE)
        for i, out in enumerate(outputs)
    ]
    return torch.autograd.grad(outputs, inputs, upstream)


@pytest.mark.parametrize(("kernel", "case"), CASES, ids=lambda x: getattr(x, "kernel_id", str(x)))
def test_no_further_from_the_truth_than_hugging_face(kernel: Any, case: Case) -> None:
    check_backend(kernel, case)


@pytest.mark.parametrize("check", [check_double_backward, check_saves_nothing])
@KERNELS
def test_autograd_holds(check: Callable[..., None], kernel: Any) -> None:
    check(kernel, PARTIAL[kernel])


@KERNELS
@pytest.mark.parametrize(
    ("heads", "size", "width"),
    [
        ((4, 2), 32, 32),
        ((2, 2), 64, 64),
        ((3, 1), 80, 32),
        ((5, 1), 96, 96),
        ((7, 2), 128, 128),
        ((2, 1), 256, 64),
        ((66, 3), 32, 32),
    ],
)
def test_head_sizes_and_groups(kernel: Any, heads: tuple[int, int], size: int, width: int) -> None:
    arguments = operands(kernel, heads, size, width=width)
    found, wide = kernel.load()(*arguments), truth(kernel, arguments)
    for ours, theirs in zip(found, wide, strict=True):
        assert error(ours, theirs) < 3e-7
    pairs = zip(gradients(found, leaves(arguments)), gradients(wide, leaves(arguments)))
    assert max(error(*pair) for pair in pairs) < 1e-6


#: The op's ``pairs`` and ``angles``, and the width of cos and sin for a head of 32.
PAIRED = [
    (pairs, angles, 16 if angles == "pairs" else 32)
    for pairs in ("halves", "interleaved", "interleaved_to_halves")
    for angles in ("elements", "first_half", "pairs")
]


@pytest.mark.parametrize(("pairs", "angles", "width"), PAIRED)
@pytest.mark.parametrize("heads", [(4, 2), (3, 0)])
def test_pairs_and_angles(pairs: str, angles: str, width: int, heads: tuple[int, int]) -> None:
    q, k, cos, sin = operands(ROPE, heads, width=width, tokens=3)
    given = q, k if heads[1] else None, cos, sin, 1, False, pairs, angles
    assert ROPE.why_fallback(*given) is None
    found, wide = ROPE.load()(*given), truth(ROPE, given)
    found, wide = (
        [out for out in outputs if out is not None] for outputs in (list(found), list(wide))
    )
    assert len(found) == len(wide) == 1 + bool(heads[1])
    assert max(error(*pair) for pair in zip(found, wide, strict=True)) < 3e-7
    wanted = leaves(given)
    grads = zip(gradients(found, wanted), gradients(wide, wanted), strict=True)
    assert max(error(*pair) for pair in grads) < 3e-7


@pytest.mark.parametrize("heads", [(80, 1), (1, 1)])
def test_pairs_of_part_of_a_head_in_groups_of_heads(heads: tuple[int, int]) -> None:
    q, k, cos, sin = operands(ROPE, heads, 40, width=24)
    given = q, k, cos, sin, 1, False, "interleaved", "first_half"
    found, wide = ROPE.load()(*given), truth(ROPE, given)
    assert max(error(*pair) for pair in zip(found, wide, strict=True)) < 3e-7
    assert all(torch.equal(out[..., 24:], x[..., 24:]) for out, x in zip(found, (q, k)))


#: Shape of q, of cos and unsqueeze_dim -> those of four and three dimensions.
PACKED: list[tuple[tuple[int, ...], tuple[int, ...], int, int]] = [
    ((5, 3, 32), (5, 32), -2, 2),
    ((5, 3, 32), (5, 32), 1, 2),
    ((3, 5, 32), (5, 32), 0, 1),
    ((2, 3, 5, 32), (5, 32), 0, 1),
    ((2, 5, 3, 32), (5, 32), 1, 2),
    ((2, 5, 3, 32), (1, 5, 32), -2, 2),
]


@pytest.mark.parametrize(("shape", "angles", "unsqueeze_dim", "heads"), PACKED)
@pytest.mark.parametrize("one", [False, True])
def test_packed_sequences_and_angles_without_a_batch(
    shape: tuple[int, ...], angles: tuple[int, ...], unsqueeze_dim: int, heads: int, one: bool
) -> None:
    """q, k and v of vision attention come out of one tensor of (S, 3, heads, D)."""
    axis = len(shape) - 1 - (1 if heads == 2 else 0)
    q, k, _ = draw((*shape[:axis], 3, *shape[axis:]), grad=False, device=DEVICE).unbind(axis)
    q, k = q.requires_grad_(), None if one else k.requires_grad_()
    cos, sin = (draw(angles, seed=seed, grad=False, device=DEVICE) for seed in (2, 3))
    given = q, k, cos, sin, unsqueeze_dim
    assert ROPE.why_fallback(*given) is None
    found, wide = ROPE.load()(*given), truth(ROPE, given)
    assert (found[1] is None) == one
    found, wide = found[: 1 + (not one)], wide[: 1 + (not one)]
    for ours, theirs in zip(found, wide, strict=True):
        assert ours.shape == theirs.shape
        assert error(ours, theirs) < 3e-7
    pairs = zip(gradients(found, leaves(given)), gradients(wide, leaves(given)), strict=True)
    assert max(error(*pair) for pair in pairs) < 3e-7


@pytest.mark.parametrize("tokens", [1, 32, 33])
def test_tokens_of_a_head_side_by_side(tokens: int) -> None:
    arguments = operands(ROPE, tokens=tokens, inner=False)
    found, wide = ROPE.load()(*arguments), truth(ROPE, arguments)
    assert max(error(*pair) for pair in zip(found, wide, strict=True)) < 3e-7
    assert found[0].is_contiguous()
    grads = gradients(found, leaves(arguments))
    assert grads[0].is_contiguous()
    pairs = zip(grads, gradients(wide, leaves(arguments)), strict=True)
    assert max(error(*pair) for pair in pairs) < 3e-7


@KERNELS
def test_bf16_rounds_where_the_original_does(kernel: Any) -> None:
    arguments = operands(kernel, dtype=BF16)
    found, wide = kernel.load()(*arguments), truth(kernel, arguments)
    assert found[0].dtype == BF16
    limit = 4e-3 if GPU else 1e-2
    assert max(error(*pair) for pair in zip(found, wide, strict=True)) < limit


@KERNELS
def test_results_and_gradients_lie_in_memory_as_attention_wants_them(kernel: Any) -> None:
    arguments = operands(kernel)
    found = kernel.load()(*arguments)
    assert all(out.shape[1] == heads for out, heads in zip(found, (4, 2), strict=True))
    assert all(out.transpose(1, 2).is_contiguous() for out in found)
    for x, grad in zip(arguments, gradients(found, leaves(arguments))):
        assert grad.stride() == x.stride()


def test_rope_keeps_neither_q_nor_k_for_the_backward() -> None:
    kept: list[torch.Tensor] = []
    q, k, cos, sin = operands(ROPE)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        ROPE.load()(q, k, cos, sin)
    assert {x.data_ptr() for x in kept} == {cos.data_ptr(), sin.data_ptr()}


@KERNELS
def test_another_token_count_asks_for_no_other_kernel(kernel: Any) -> None:
    module = pytest.importorskip(kernel.load().__module__)
    for tokens in (3, 2, 5):  # one token lies as heads or as tokens, whichever
        arguments = operands(kernel, tokens=tokens)
        found = kernel.load()(*arguments)
        gradients(found, leaves(arguments))
        if tokens == 3:
            before = module._launcher.cache_info().currsize
    assert module._launcher.cache_info().currsize == before


@KERNELS
def test_gradients_are_the_same_bits_each_time(kernel: Any) -> None:
    arguments = operands(kernel, (5, 2), tokens=5)
    first, second = (gradients(kernel.load()(*arguments), leaves(arguments)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@KERNELS
def test_one_tensor_may_be_q_and_k(kernel: Any) -> None:
    q, _, *rest = operands(kernel)
    found, wide = kernel.load()(q, q, *rest), truth(kernel, (q, q, *rest))
    assert max(error(*pair) for pair in zip(found, wide, strict=True)) < 3e-7
    assert error(gradients(found, [q])[0], gradients(wide, [q])[0]) < 1e-6


@KERNELS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(kernel: Any, reentrant: bool) -> None:
    arguments = operands(kernel)
    plain = gradients(kernel.load()(*arguments), leaves(arguments))
    outputs = checkpoint(kernel.load(), *arguments, use_reentrant=reentrant)
    upstream = [
        draw(tuple(out.shape), seed=7 + i, grad=False, device=DEVICE)
        for i, out in enumerate(outputs)
    ]
    torch.autograd.backward(outputs, upstream)
    found = [leaf.grad for leaf in leaves(arguments)]
    assert all(map(torch.equal, found, plain))


@KERNELS
def test_compiles_as_one_graph_whatever_the_token_count(kernel: Any) -> None:
    torch._dynamo.reset()
    function = torch.compile(kernel.load(), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 3):
        arguments = operands(kernel, tokens=tokens)
        found, plain = function(*arguments), kernel.load()(*arguments)
        assert all(map(torch.equal, found, plain))
        assert [out.stride() for out in found] == [out.stride() for out in plain]
        pairs = zip(gradients(found, leaves(arguments)), gradients(plain, leaves(arguments)))
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_pairs_of_packed_sequences_compile_as_one_graph(packed: bool, one: bool) -> None:
    torch._dynamo.reset()
    function = torch.compile(ROPE.load(), fullgraph=True, backend="aot_eager")
    q, k, cos, sin = operands(ROPE)
    k = None if one else k
    given: tuple[Any, ...] = (q, k, cos, sin, 1, False, "interleaved_to_halves", "first_half")
    if packed:
        given = q[0], k if k is None else k[0], cos[0], sin[0], 0, False, "interleaved"
    found, plain = (list(call(*given)) for call in (function, ROPE.load()))
    assert (found.pop() is plain.pop() is None) if one else len(found) == 2
    assert all(map(torch.equal, found, plain))
    wanted = [q] if one else [q, k]
    assert all(map(torch.equal, gradients(found, wanted), gradients(plain, wanted)))


@KERNELS
def test_exports(kernel: Any) -> None:
    class Module(torch.nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return kernel.load()(*arguments)

    arguments = operands(kernel, grad=False)
    program = torch.export.export(Module(), arguments)
    assert f"hf_kernel_patch.{kernel.op}" in str(program.graph)
    assert torch.equal(program.module()(*arguments)[0], kernel.load()(*arguments)[0])


@KERNELS
def test_opcheck(kernel: Any) -> None:
    arguments = operands(kernel)
    options = (1, F32, F32, True, False, 0, 0, 0) if kernel is ROPE else (1, 0.0, True)
    kernel.load()
    operator = getattr(torch.ops.hf_kernel_patch, kernel.op)
    torch.library.opcheck(operator.default, (*arguments, *options))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, cos, sin: (q, k, cos.detach().requires_grad_(), sin), "gradient"),
        (lambda q, k, cos, sin: (q[0], k[0], cos, sin), "dimensions"),
        (lambda q, k, cos, sin: (q, k[..., :-1, :], cos, sin), "differ"),
        (lambda q, k, cos, sin: (q, k, cos[:, :0], sin[:, :0]), "length"),
        (lambda q, k, cos, sin: (q[..., :8], k[..., :8], cos, sin), "wider"),
        (lambda q, k, cos, sin: (q, k, cos[..., :31], sin[..., :31]), "odd"),
        (lambda q, k, cos, sin: (q, k, cos.to("meta"), sin.to("meta")), "devices"),
        (lambda q, k, cos, sin: (q, k, cos, sin, 0), "dimensions"),
        (lambda q, k, cos, sin: (q, k, cos, sin, 5), "dimensions"),
        (lambda q, k, cos, sin: (q, k, cos[0], sin, 0), "dimensions"),
        (lambda q, k, cos, sin: (q[0], k, cos[0], sin[0], 0), "dimensions"),
        (lambda q, k, cos, sin: (q[0, 0], None, cos[0], sin[0], 0), "dimensions"),
        (lambda q, k, cos, sin: (q, k, cos, sin, 1, False, "halves", "pairs"), "wider"),
        (lambda q, k, cos, sin: (q, None, cos[..., :0], sin[..., :0]), "wider"),
    ],
)
def test_rope_refuses(change: Callable[..., Any], reason: str) -> None:
    arguments = operands(ROPE, grad=False)
    assert ROPE.why_fallback(*arguments) is None
    assert reason in str(ROPE.why_fallback(*change(*arguments)))


def test_rope_of_other_dimensions_raises_where_nobody_asks_it_to_refuse() -> None:
    q, k, cos, sin = operands(ROPE, grad=False)
    with pytest.raises(ValueError, match="unsqueeze_dim 0"):
        ROPE.load()(q, k, cos, sin, 0)


def test_qk_norm_rope_refuses_weights_of_another_width() -> None:
    q, k, q_weight, *rest = operands(NORMED, grad=False)
    assert NORMED.why_fallback(q, k, q_weight, *rest) is None
    assert "weights" in str(NORMED.why_fallback(q, k, q_weight[:8], *rest))


@needs_gpu
@KERNELS
@pytest.mark.parametrize("half", [F16, BF16])
def test_offsets_beyond_31_bits(kernel: Any, half: torch.dtype) -> None:
    tokens, stride = 3, (1 << 30) + 8
    q, k, *rest = operands(kernel, tokens=tokens, dtype=half, grad=False)
    storage = torch.empty(2 * stride + q.numel(), dtype=half, device=DEVICE)
    token = 2 if kernel is ROPE else 1
    strides = list(q.stride())
    strides[token] = stride
    far = storage.as_strided(q[:1].shape, strides).copy_(q[:1])
    rest = [x[:1] if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in rest]
    found = kernel.load()(far, k[:1], *rest)
    assert torch.equal(found[0], kernel.load()(q[:1], k[:1], *rest)[0])


@needs_gpu
@KERNELS
def test_a_cuda_graph_replays_it(kernel: Any) -> None:
    arguments = operands(kernel, grad=False)
    other = operands(kernel, grad=False)
    other[0].mul_(2.0)
    wanted = kernel.load()(*other)
    graph = torch.cuda.CUDAGraph()
    kernel.load()(*arguments)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = kernel.load()(*arguments)
    arguments[0].copy_(other[0])
    graph.replay()
    assert all(map(torch.equal, found, wanted))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@KERNELS
def test_launches_on_the_tensors_device(kernel: Any) -> None:
    arguments = operands(kernel, grad=False)
    there = [x.to("cuda:1") if isinstance(x, torch.Tensor) else x for x in arguments]
    found = kernel.load()(*there)
    assert found[0].device == torch.device("cuda:1")
    assert all(
        map(torch.equal, (x.cpu() for x in found), (x.cpu() for x in kernel.load()(*arguments)))
    )
