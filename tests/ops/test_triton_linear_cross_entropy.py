"""linear_cross_entropy in Triton: chunks of rows, slices of the vocabulary, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.linear_cross_entropy import CudaFusedLinearCrossEntropy, chunks
from tests.support.ops import cases_linear_cross_entropy as plain
from tests.support.ops.checks import (
    F32,
    Case,
    check_backend,
    check_double_backward,
    check_saves_nothing,
    draw,
)
from tests.support.ops.interpreted import DEVICE, GPU, MARKS, here, needs_gpu
from tests.support.tiny import error

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
LOSS = here(CudaFusedLinearCrossEntropy)
EXACT = type(
    "Exact",
    (LOSS,),
    {"load": classmethod(lambda cls: lambda *a, **k: LOSS.load()(*a, exact=True, **k))},
)
#: The interpreter truncates to bf16; of many tokens it takes long. In one case eager's loss is by
#: chance within a twentieth of an epsilon.
CASES = [
    case
    for case in plain.CASES
    if (GPU or ("bf16" not in case.name and "many" not in case.name and "Inf" not in case.name))
    and case.name != "a bias, scaled and softcap-fp32"
]
PARTED = [
    case
    for case in CASES
    if case.name.partition("-fp")[0]
    in (
        "plain",
        "another ignore_index",
        "a bias, scaled and softcap",
        "num_items_in_batch, a tensor",
        "label smoothing, z-loss and softcap",
        "no token",
        "frozen head",
        "half of a wider tensor",
    )
]
BOTH = pytest.mark.parametrize("kernel", [LOSS, EXACT], ids=["early", "exact"])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 5 rows, slices of 24 tokens."""
    monkeypatch.setattr(chunks, "STEP", 5)
    monkeypatch.setattr(chunks, "SLICE_STEP", 24)
    for name in ("CHUNK_MIB", "SLICE_MIB", "FIRST_MIB"):
        monkeypatch.setattr(chunks, name, 1e-4)
    yield


@BOTH
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_further_from_the_truth_than_hugging_face(kernel: Any, case: Case) -> None:
    check_backend(kernel, case)


@BOTH
@pytest.mark.parametrize("case", PARTED, ids=str)
@pytest.mark.usefixtures("small_parts")
def test_parts_give_the_same_as_the_whole(kernel: Any, case: Case) -> None:
    check_backend(kernel, case)


@BOTH
@pytest.mark.parametrize("holds", [check_double_backward, check_saves_nothing])
@pytest.mark.parametrize("case", plain.PLAIN, ids=str)
def test_autograd_holds(kernel: Any, holds: Callable[..., None], case: Case) -> None:
    holds(kernel, case)


@BOTH
@pytest.mark.parametrize("metrics", plain.METRICS[:-1], ids=str)
@pytest.mark.usefixtures("small_parts")
def test_accuracy_and_entropy(kernel: Any, metrics: Case) -> None:
    plain.check_metrics(kernel, metrics)


@pytest.mark.parametrize("exact", [False, True])
def test_a_graph_that_is_kept_gives_its_gradients_again(exact: bool) -> None:
    plain.check_kept_graph(LOSS, exact)


@BOTH
def test_float16_gradients_neither_vanish_nor_overflow(kernel: Any) -> None:
    plain.check_float16(kernel)


@pytest.mark.parametrize("label", [-1, plain.VOCABULARY, plain.VOCABULARY + 2, 10**6])
@BOTH
@pytest.mark.usefixtures("small_parts")
def test_a_label_that_is_no_token_gives_nan_and_reads_nothing(kernel: Any, label: int) -> None:
    (hidden, weight, labels), _ = plain.case("plain", ignored="none").inputs(DEVICE)
    labels[1, 4] = label
    assert kernel.load()(hidden, weight, labels).isnan()


@pytest.mark.parametrize("size", [1, 4095, 4096, 100_000, 100_003])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_gradients_are_scaled_in_place(size: int, factor: float) -> None:
    module = pytest.importorskip("hf_kernel_patch.ops.linear_cross_entropy.triton")
    x = draw((size,), grad=False, device=DEVICE)
    expected = x * factor
    assert module._scale_(x, torch.tensor(factor, device=DEVICE)) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0])
def test_the_cap_is_as_precise_near_zero_as_far_from_it(cap: float) -> None:
    options = {"softcap": cap, "ignored": "none"}
    for scale in (1e-3, 0.1, 1.0):
        (hidden, weight, labels), _ = plain.case("cap", F32, **options).inputs(DEVICE)
        found = LOSS.load()(hidden, weight, labels, softcap=cap, scale=scale)
        wide = plain.original(
            hidden.double(), weight.double(), labels, softcap=cap, scale=scale, label_smoothing=0.0
        )
        assert error(found.detach(), wide.detach()) < 3e-7
        ours, theirs = (torch.autograd.grad(one, hidden)[0] for one in (found, wide))
        assert error(ours, theirs) < 1e-6


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"metrics": True, "softcap": 5.0}])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_into_one_graph(options: dict[str, Any], frozen: bool) -> None:
    (hidden, weight, labels), _ = plain.case("plain", grads=(True, not frozen)).inputs(DEVICE)
    leaves, function = [hidden] if frozen else [hidden, weight], LOSS.load()

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = function(hidden * 2, weight, labels, **options)
        return found[0] + 0 * found[1].mean_entropy if options.get("metrics") else found

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours, eager = compiled(hidden, weight, labels), loss(hidden, weight, labels)
        assert torch.equal(ours, eager)
        for pair in zip(
            torch.autograd.grad(ours, leaves), torch.autograd.grad(eager, leaves), strict=True
        ):
            assert torch.equal(*pair)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, weight, labels), eager.detach())


@needs_gpu
@pytest.mark.parametrize("exact", [False, True])
def test_offsets_beyond_two_to_the_31(exact: bool) -> None:
    """2.2 billion logits in one chunk, the last rows of which have to be right."""
    rows, vocabulary, width = 16896, 131072, 16
    hidden = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    options = {"exact": exact, "memory_mib": 8192, "num_items_in_batch": 1}
    whole = LOSS.load()(hidden, weight, None, shift_labels=labels, **options)
    last = hidden.detach()[-7:].requires_grad_()
    part = LOSS.load()(last, weight, None, shift_labels=labels[-7:], **options)
    ours, theirs = torch.autograd.grad(whole, hidden)[0][-7:], torch.autograd.grad(part, last)[0]
    assert error(ours, theirs) < 1e-2
