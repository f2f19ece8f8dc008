"""qk_norm_rope with other rotary functions: OLMo2's, which casts back, that of vision models, which
rotates in float32, and of pairs of neighbours.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.func import functional_call

from hf_kernel_patch.ops.qk_norm_rope import CudaFusedQKNormRoPE
from hf_kernel_patch.ops.qk_norm_rope.reference import qk_norm_rope
from hf_kernel_patch.ops.rope.shapes import ELEMENTS, FIRST_HALF, HALVES, INTERLEAVED
from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    SHORT,
    Case,
    backends,
    check_backend,
    check_double_backward,
    check_reference,
    check_saves_nothing,
    draw,
)
from tests.support.ops.interpreted import GPU, MARKS, here

pytestmark = MARKS
EPS, SIZE, HEADS = 1e-6, 10, (3, 1)
_CAST, _FLOAT = (1, True, False, HALVES, ELEMENTS), (2, True, True, HALVES, ELEMENTS)
_PAIRS, _FIRST = (1, True, True, INTERLEAVED, ELEMENTS), (1, False, False, INTERLEAVED, FIRST_HALF)
#: Flavour -> (model of the norm, its class, cast_first, model of the rotary function, its name,
#: unsqueeze_dim and the op's last options).
FLAVOURS = {
    "olmo2": ("olmo2", "Olmo2RMSNorm", False, "olmo2", "apply_rotary_pos_emb", _CAST),
    "llama": ("llama", "LlamaRMSNorm", True, "olmo2", "apply_rotary_pos_emb", _CAST),
    "vision": ("llama", "LlamaRMSNorm", True, "qwen2_vl", "apply_rotary_pos_emb_vision", _FLOAT),
    "helium": ("llama", "LlamaRMSNorm", True, "helium", "apply_rotary_pos_emb", _FIRST),
    "cohere": ("olmo2", "Olmo2RMSNorm", False, "cohere", "apply_rotary_pos_emb", _PAIRS),
}
#: Dtypes of q and k, of the weights, of cos and sin.
DTYPES = ((F32,) * 3, (BF16, BF16, F32), (BF16,) * 3, (F16, F16, F32), (F16, F32, F32))


def part(model: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


def case(flavour: str, dtypes: tuple[torch.dtype, ...], length: int = 5) -> Case:
    model, kind, cast_first, rotary, function, (unsqueeze_dim, *last) = FLAVOURS[flavour]

    def inputs(device: str) -> Any:
        heads = (
            draw((2, length, count, SIZE), dtypes[0], seed=i, grad=True, device=device)
            for i, count in enumerate(HEADS)
        )
        weights = (draw((SIZE,), dtypes[1], seed=i, grad=True, device=device) for i in (2, 3))
        angles = (
            draw((1, length, SIZE), dtypes[2], seed=i, grad=False, device=device) for i in (4, 5)
        )
        options = unsqueeze_dim, 0.0, cast_first, *last
        return (*heads, *weights, EPS, *angles, *options), {}

    def original(q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float, *rest: Any) -> Any:
        norm = part(model, kind)(SIZE, eps)
        q = functional_call(norm, {"weight": q_weight}, (q,))
        k = functional_call(norm, {"weight": k_weight}, (k,))
        if unsqueeze_dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return part(rotary, function)(q, k, *rest[:2])

    kinds = "-".join(SHORT[dtype] for dtype in dtypes)
    return Case(f"{flavour}-{kinds}", "qk_norm_rope", inputs, original, exact=True)


CASES = [case(flavour, dtypes) for flavour in FLAVOURS for dtypes in DTYPES]
#: The interpreter takes bf16 for integers.
INTERPRETED = [one for one in CASES if GPU or "bf16" not in one.name]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_what_hugging_face_computes(case: Case) -> None:
    check_reference(case)


@pytest.mark.parametrize(("kernel", "case"), backends(CASES))
def test_backend_is_no_further_from_the_truth_than_hugging_face(kernel: Any, case: Case) -> None:
    check_backend(kernel, case)


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_the_triton_kernel(case: Case) -> None:
    check_backend(here(CudaFusedQKNormRoPE), case)


@pytest.mark.parametrize("check", [check_double_backward, check_saves_nothing])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_autograd_of_the_triton_kernel_holds(check: Any, flavour: str) -> None:
    check(here(CudaFusedQKNormRoPE), case(flavour, DTYPES[0], length=2))


@pytest.mark.parametrize("length", [0, 3])
def test_the_operator_s_results_are_cast(length: int) -> None:
    kernel = here(CudaFusedQKNormRoPE)
    arguments, _ = case("olmo2", (F16, F16, F32), length).inputs("cuda" if GPU else "cpu")
    kernel.load()
    operator = torch.ops.hf_kernel_patch.qk_norm_rope
    *given, cast, _, _, _ = arguments
    torch.library.opcheck(operator.default, (*given, cast))
    assert {x.dtype for x in operator(*given, cast)} == {F16}
    assert {x.dtype for x in operator(*given)} == {F32}


def test_gradients_of_gradients_where_only_one_result_has_a_graph() -> None:
    kernel = here(CudaFusedQKNormRoPE)
    (q, k, *rest), _ = case("llama", DTYPES[0], length=2).inputs("cuda" if GPU else "cpu")
    rest = [one.detach() if isinstance(one, torch.Tensor) else one for one in rest]
    second = []
    for function in (kernel.load(), qk_norm_rope):
        out = function(q, k.detach(), *rest)[0]
        (first,) = torch.autograd.grad((out * out).sum(), q, create_graph=True)
        second.append(torch.autograd.grad((first * first).sum(), q)[0])
    torch.testing.assert_close(*second)
