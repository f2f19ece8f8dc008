"""linear_cross_entropy: chunks and slices, metrics, what a call costs, gradients in float16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kernel_patch.ops.linear_cross_entropy import TorchFusedLinearCrossEntropy, chunks
from hf_kernel_patch.ops.linear_cross_entropy import torch as torch_backend
from tests.support.ops.cases_linear_cross_entropy import (
    CASES,
    HIDDEN,
    METRICS,
    VOCABULARY,
    case,
    check_float16,
    check_kept_graph,
    check_metrics,
)
from tests.support.ops.checks import (
    Case,
    backends,
    check_backend,
    device_of,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_backend_gives_the_same_in_several_chunks(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "CHUNK_MIB", 5 * VOCABULARY * 4 / 2**20)
    monkeypatch.setattr(chunks, "STEP", 5)
    check_backend(TorchFusedLinearCrossEntropy, case)


@pytest.mark.parametrize(
    ("grads", "recorded", "products"),
    [((True, True), True, 3), ((True, False), True, 2), ((True, True), False, 1)],
)
@pytest.mark.parametrize(("kernel", "plain"), backends([case("plain")]))
def test_frozen_heads_ignored_rows_and_unrecorded_calls_cost_no_product(
    kernel: Any, plain: Case, grads: tuple[bool, bool], recorded: bool, products: int
) -> None:
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton

    (hidden, weight, labels), _ = case("plain", grads=grads).inputs(device_of(kernel))
    counted = int((labels[:, 1:] != -100).sum())
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(recorded):
        loss = kernel.load()(hidden, weight, labels)
        if recorded:
            loss.backward()
    assert counter.get_total_flops() == products * 2 * counted * HIDDEN * VOCABULARY


@pytest.mark.parametrize(("kernel", "metrics"), backends(METRICS))
def test_accuracy_and_entropy_are_those_of_the_logits(kernel: Any, metrics: Case) -> None:
    check_metrics(kernel, metrics)


@pytest.mark.parametrize("kernel", [pytest.param(*p.values[:1]) for p in backends([case("plain")])])
@pytest.mark.parametrize("exact", [False, True])
def test_a_graph_that_is_kept_gives_its_gradients_again(kernel: Any, exact: bool) -> None:
    check_kept_graph(kernel, exact)


@pytest.mark.parametrize("kernel", [pytest.param(*p.values[:1]) for p in backends([case("plain")])])
def test_float16_gradients_neither_vanish_nor_overflow(kernel: Any) -> None:
    check_float16(kernel)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "itemsize", "memory", "expected"),
    [
        (8192, 128256, 2, None, 2048),  # a quarter
        (16384, 151936, 2, None, 4096),
        (1024, 128256, 2, None, 1024),  # one chunk
        (4096, 128256, 2, None, 2048),  # what fills the matrix units
        (65536, 128256, 2, None, 5120),  # what the memory allows
        (8192, 128256, 4, None, 2048),
        (8192, 128256, 2, 256, 1024),
        (8192, 10**6, 2, 1, 128),  # never fewer
    ],
)
def test_chunks_fill_the_matrix_units_within_the_memory(
    rows: int, vocabulary: int, itemsize: int, memory: float | None, expected: int
) -> None:
    found = chunks.chunk_rows(rows, vocabulary, itemsize, memory)
    assert found == expected
    assert found * vocabulary * itemsize <= 2**20 * (memory or chunks.CHUNK_MIB) or found == 128


@pytest.mark.parametrize("rows", [1, 700, 8192, 100_000])
@pytest.mark.parametrize("vocabulary", [97, 128256, 262144])
def test_slices_cover_the_vocabulary_within_the_memory(rows: int, vocabulary: int) -> None:
    width = chunks.slice_width(rows, vocabulary, 2, chunks.SLICE_MIB)
    assert 0 < width <= vocabulary
    assert rows * width * 2 <= chunks.SLICE_MIB * 2**20 or width == chunks.SLICE_STEP
