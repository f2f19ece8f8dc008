"""Whatever the loss is given: the result of the original, in its dtype and shape, or its error."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import pytest
import torch

import hf_kernel_patch
from tests.recognition.rules.head_loss.steps import LOSS, labels
from tests.support.tiny import error, tiny_model, tokens

F64, BF16, F16 = torch.float64, torch.bfloat16, torch.float16
#: num_items_in_batch, and whether the op takes it.
ITEMS: dict[str, tuple[Any, bool]] = {
    "none": (None, True),
    "an int": (7, True),
    "a bool": (True, True),
    "zero": (0, True),
    "negative": (-3, True),
    "a large int": (2**24 + 1, True),
    "an int that no tensor holds": (2**70, False),
    "a float": (7.3, True),
    "infinite": (float("inf"), True),
    "NumPy's float": (numpy.float64(7.3), True),
    "NumPy's float32": (numpy.float32(7.3), False),
    "NumPy's int": (numpy.int64(7), False),
    "an array": (numpy.array(7), False),
    "complex": (1 + 2j, False),
    "text": ("7", False),
    "a list": ([7], False),
    "int64": (torch.tensor(7), True),
    "int32": (torch.tensor(7, dtype=torch.int32), True),
    "uint8": (torch.tensor(7, dtype=torch.uint8), True),
    "bool": (torch.tensor(True), True),
    "float32": (torch.tensor(7.3), True),
    "float64": (torch.tensor(7.3, dtype=F64), True),
    "float64 of an int": (torch.tensor(7, dtype=F64), True),
    "bfloat16": (torch.tensor(7.3, dtype=BF16), True),
    "float16": (torch.tensor(7.3, dtype=F16), True),
    "complex64": (torch.tensor(7 + 1j), False),
    "one int64": (torch.tensor([7]), True),
    "one int64, two dimensions": (torch.tensor([[7]]), True),
    "one int32": (torch.tensor([7], dtype=torch.int32), True),
    "one float32": (torch.tensor([7.3]), True),
    "one float64": (torch.tensor([7.3], dtype=F64), True),
    "one float64, two dimensions": (torch.tensor([[7.3]], dtype=F64), True),
    "one bfloat16": (torch.tensor([7.3], dtype=BF16), True),
    "one float16": (torch.tensor([[7.3]], dtype=F16), True),
    "several int64": (torch.tensor([7, 9]), True),
    "several float64": (torch.tensor([7.3, 9.1], dtype=F64), True),
    "several bfloat16": (torch.tensor([7.3, 9.1], dtype=BF16), True),
    "none at all": (torch.zeros(0), True),
    "with a gradient": (torch.tensor(7.3, requires_grad=True), False),
}


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model(name, dtype, num_hidden_layers=1)


def outcome(model: Any, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The loss, or its error, and the gradients of its sum."""
    model.zero_grad()
    try:
        loss = model(tokens(), **{"labels": labels(), **options}).loss
    except Exception as raised:
        return raised, {}
    if loss.requires_grad and not loss.is_complex():
        loss.sum().backward()
    named = model.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def same(ours: Any, eager: Any) -> None:
    (loss, gradients), (expected, wanted) = ours, eager
    assert type(loss) is type(expected), (loss, expected)
    if isinstance(expected, Exception):
        assert str(loss) == str(expected)
        return
    assert (loss.dtype, loss.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient.isfinite(), wanted[name].isfinite()), name
        finite = [one.nan_to_num(0, 0, 0) for one in (gradient, wanted[name])]
        assert error(*finite) < 4e-6, name


@pytest.mark.parametrize("case", ITEMS)
def test_num_items_in_batch_of_any_kind(case: str) -> None:
    items, taken = ITEMS[case]
    model = model_of("llama").train()
    eager = outcome(model, num_items_in_batch=items)
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True) as report:
        ours = outcome(model, num_items_in_batch=items)
    same(ours, eager)
    assert sum(row.served for row in report) == taken


@pytest.mark.parametrize("case", ["float64", "one float64, two dimensions", "one bfloat16"])
def test_a_divisor_s_own_dtype_with_metrics_and_in_half_precision(case: str) -> None:
    items, _ = ITEMS[case]
    model = model_of("llama", BF16).train()
    eager, wanted = outcome(model, num_items_in_batch=items)
    asked = {LOSS: {"metrics": True}}
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True, options=asked):
        ours, gradients = outcome(model, num_items_in_batch=items)
    assert (ours.dtype, ours.shape) == (eager.dtype, eager.shape)
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=0)
    assert max(error(gradients[name], wanted[name]) for name in wanted) < 2e-2


#: Arguments of the model: those of the loss among them, and wrong ones.
GIVEN: dict[str, dict[str, Any]] = {
    "vocab_size twice": {"vocab_size": 128},
    "another vocab_size twice": {"vocab_size": 7},
    "logits twice": {"logits": 3},
    "an ignore_index of None": {"ignore_index": None},
    "a float for ignore_index": {"ignore_index": 3.0},
    "a bool for ignore_index": {"ignore_index": True},
    "a tensor for ignore_index": {"ignore_index": torch.tensor(3)},
    "text for ignore_index": {"ignore_index": "3"},
    "ignore_index of a token": {"ignore_index": 3},
    "a source": {"source": 1},
    "a target": {"target": 1},
    "something unknown": {"unknown": 1, "weight": torch.ones(128), "reduction": "none"},
    "no shift_labels": {"shift_labels": None},
    "shift_labels alone count": {"labels": "nothing", "shift_labels": labels()},
    "shorter shift_labels": {"shift_labels": labels()[:, :-1].contiguous()},
    "flat shift_labels": {"shift_labels": labels().flatten()},
    "shift_labels in strides": {"shift_labels": labels().repeat_interleave(2, 1)[:, ::2]},
    "transposed shift_labels": {"shift_labels": labels().t().contiguous().t()},
    "float shift_labels": {"shift_labels": labels().float()},
    "shift_labels in a list": {"shift_labels": labels().tolist()},
    "float labels": {"labels": labels().float()},
    "double labels": {"labels": labels().double()},
    "int32 labels": {"labels": labels().int()},
    "uint8 labels": {"labels": tokens().to(torch.uint8)},
    "bool labels": {"labels": tokens() > 3},
    "labels in a list": {"labels": labels().tolist()},
    "labels of a number": {"labels": 3},
    "one label": {"labels": torch.tensor(3)},
    "flat labels": {"labels": labels().flatten()},
    "labels in three dimensions": {"labels": labels()[..., None]},
    "shorter labels": {"labels": labels()[:, :-1]},
    "a label too large": {"labels": labels().index_fill(1, torch.tensor(9), 128)},
    "a label too small": {"labels": labels().index_fill(1, torch.tensor(9), -1)},
    "an ignored label that is too large": {
        "labels": labels().index_fill(1, torch.tensor(9), 500),
        "ignore_index": 500,
    },
    "all labels ignored": {"labels": torch.full_like(tokens(), -100)},
    "all labels ignored of a counted batch": {
        "labels": torch.full_like(tokens(), -100),
        "num_items_in_batch": 3,
    },
    "all labels ignored of none": {
        "labels": torch.full_like(tokens(), -100),
        "num_items_in_batch": torch.tensor(0),
    },
    "no labels of a batch": {"labels": labels()[:0]},
    "no position": {"labels": labels()[:, :0], "logits_to_keep": torch.zeros(0).long()},
    "positions of a mask": {
        "labels": labels()[:, 3:7],
        "logits_to_keep": torch.tensor([False] * 3 + [True] * 4 + [False] * 10),
    },
}


#: For a model that hands them to its loss by place.
BY_PLACE = [
    "vocab_size twice",
    "logits twice",
    "an ignore_index of None",
    "a target",
    "float labels",
]


@pytest.mark.parametrize(
    ("name", "case"), [*(("llama", case) for case in GIVEN), *(("gemma2", c) for c in BY_PLACE)]
)
def test_an_argument_of_any_kind(name: str, case: str) -> None:
    model = model_of(name).train()
    eager = outcome(model, **GIVEN[case])
    with hf_kernel_patch.patched(LOSS, models=name, strict=True):
        same(outcome(model, **GIVEN[case]), eager)


@pytest.mark.parametrize("case", ["vocab_size twice", "an ignore_index of None", "int32 labels"])
def test_an_argument_of_any_kind_in_an_evaluation(case: str) -> None:
    model = model_of("llama").eval()
    eager = outcome(model, **GIVEN[case])
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        same(outcome(model, **GIVEN[case]), eager)


def test_an_empty_batch() -> None:
    model = model_of("llama").train()
    given = {"inputs_embeds": torch.zeros(0, 5, 64), "labels": torch.zeros(0, 5).long()}

    def call() -> Any:
        try:
            return model(**given).loss
        except Exception as raised:
            return type(raised)

    eager = call()
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        ours = call()
    assert str(ours) == str(eager) or (ours.isnan() and eager.isnan())


class Scorer:
    """A loss function that is no function; ``vocab_size`` comes twice to it."""

    def __call__(self, logits: Any, labels: Any, vocab_size: int, **options: Any) -> Any:
        return logits.square().mean() * vocab_size


@pytest.mark.parametrize("options", [{}, {"vocab_size": 3}])
def test_a_loss_function_of_the_user_s_is_called_as_it_was(options: dict[str, Any]) -> None:
    model = tiny_model("llama", num_hidden_layers=1).train()
    model.loss_function = Scorer()
    eager = outcome(model, **options)
    with hf_kernel_patch.patched(LOSS, models="llama", strict=True):
        same(outcome(model, **options), eager)
