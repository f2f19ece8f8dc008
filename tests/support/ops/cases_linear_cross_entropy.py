"""linear_cross_entropy: the reference and every backend against the head and ForCausalLMLoss."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tests.support.ops.checks import (
    BF16,
    F16,
    F32,
    F64,
    SHORT,
    Case,
    device_of,
    draw,
)
from tests.support.tiny import error

VOCABULARY, HIDDEN = 101, 61
ITEMS = {
    "tensor": torch.tensor(13),
    "scattered": torch.tensor([[13]]),
    "several": torch.tensor([13, 5]),
}


def case(
    name: str,
    dtype: torch.dtype = F32,
    *,
    shape: tuple[int, int] = (2, 11),
    ignored: str = "some",
    shifted: bool = False,
    items: str | int | None = None,
    grads: tuple[bool, bool] = (True, True),
    layout: str = "contiguous",
    poison: float | None = None,
    bias: bool = False,
    **options: Any,
) -> Case:
    """``ignored`` labels: "none", "some" or "all"; ``items`` is num_items_in_batch."""

    def inputs(device: str) -> Any:
        hidden = draw(
            (*shape, HIDDEN), dtype, grad=grads[0], layout=layout, poison=poison, device=device
        )
        weight = draw((VOCABULARY, HIDDEN), dtype, seed=1, scale=0.25, grad=grads[1], device=device)
        generator = torch.Generator().manual_seed(2)
        labels = torch.randint(0, VOCABULARY, shape, generator=generator)
        if ignored != "none":
            chosen = torch.rand(shape, generator=generator) < (0.3 if ignored == "some" else 2)
            labels = labels.masked_fill(chosen, options.get("ignore_index", -100))
        labels = labels.to(device)
        extra = dict(options)
        if items is not None:
            extra["num_items_in_batch"] = ITEMS[items] if isinstance(items, str) else items
        if shifted:
            extra["shift_labels"] = labels
        if bias:
            extra["bias"] = draw((VOCABULARY,), dtype, seed=3, grad=grads[1], device=device)
        return (hidden, weight, None if shifted else labels), extra

    return Case(f"{name}-{SHORT[dtype]}", "linear_cross_entropy", inputs, original)


def original(
    hidden: Any,
    weight: Any,
    labels: Any,
    *,
    bias: Any = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **options: Any,
) -> torch.Tensor:
    """The lines between head and loss of Granite and Gemma 2, and the loss of transformers.

    Which knows neither label smoothing nor z-loss: PyTorch's own stand in for them.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = F.linear(hidden, weight, bias)
    if scale != 1.0:
        logits = logits / (1.0 / scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if not (label_smoothing or z_loss):
        return ForCausalLMLoss(logits, labels, VOCABULARY, **options)
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    logits = logits.float().view(-1, VOCABULARY)
    mean = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return mean + z_loss * logits[targets != -100].logsumexp(-1).square().mean()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no label ignored": {"ignored": "none"},
    "all labels ignored": {"ignored": "all"},
    "all labels ignored of a counted batch": {"ignored": "all", "items": 5},
    "another ignore_index": {"ignore_index": 3},
    "num_items_in_batch, an int": {"items": 13},
    "num_items_in_batch, a tensor": {"items": "tensor"},
    "num_items_in_batch, as it is scattered": {"items": "scattered"},
    "num_items_in_batch, several": {"items": "several"},
    "shift_labels": {"shifted": True},
    "scaled": {"scale": 0.125},
    "softcap": {"softcap": 3.0},
    "scaled and softcap": {"scale": 0.5, "softcap": 5.0, "items": 7},
    "a bias on the head": {"bias": True},
    "a bias, scaled and softcap": {"bias": True, "scale": 0.5, "softcap": 5.0},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "label smoothing, z-loss and softcap": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 5.0},
    "many tokens": {"shape": (4, 160)},
    "two tokens": {"shape": (1, 2), "ignored": "none"},
    "one token": {"shape": (1, 1)},
    "no token": {"shape": (2, 0)},
    "no token of a counted batch": {"shape": (0, 5), "items": 3},
    "half of a wider tensor": {"layout": "half"},
    "every second element": {"layout": "sliced"},
    "expanded": {"layout": "expanded"},
    "hidden outermost": {"layout": "transposed"},
    "NaN": {"ignored": "none", "poison": float("nan")},
    "Inf": {"ignored": "none", "poison": float("inf")},
    "frozen head": {"grads": (True, False)},
    "frozen hidden": {"grads": (False, True)},
    "all frozen": {"grads": (False, False)},
}
#: A gradient of the loss that is no power of two is one rounding more.
CASES = [
    case(name, dtype, **options)
    for name, options in OPTIONS.items()
    for dtype in (F32, BF16, F16)
    if dtype is not BF16 or options.get("items") not in ("scattered", "several")
]
PLAIN = [
    case("plain"),
    case("softcap", softcap=3.0, scale=0.5),
    case("bias, label smoothing and z-loss", bias=True, label_smoothing=0.1, z_loss=0.1),
]
METRICS = [
    case("metrics", metrics=True),
    case("metrics, softcap", metrics=True, softcap=3.0, scale=0.5),
    case("metrics, nothing ignored", metrics=True, ignored="none", bias=True),
    case("metrics, everything ignored", metrics=True, ignored="all"),
    case("metrics, z-loss", BF16, metrics=True, z_loss=0.1),
]


def check_metrics(kernel: Any, metrics: Case) -> None:
    """Accuracy and entropy are those of the logits."""
    (hidden, weight, labels), options = metrics.inputs(device_of(kernel))
    labels[:, 1::3] = F.linear(hidden, weight, options.get("bias")).argmax(-1)[:, :-1:3]
    loss, found = kernel.load()(hidden, weight, labels, **options)
    expected, truth = metrics.reference(
        hidden.double(),
        weight.double(),
        labels,
        **{k: v.double() if torch.is_tensor(v) else v for k, v in options.items()},
        dtype=F64,
    )
    assert not any(one.requires_grad for one in found)
    torch.testing.assert_close(found.token_accuracy.double(), truth.token_accuracy, equal_nan=True)
    tolerance = {"rtol": 1e-2 if hidden.dtype is BF16 else 1e-5, "atol": 0}
    torch.testing.assert_close(
        found.mean_entropy.double(), truth.mean_entropy, equal_nan=True, **tolerance
    )
    torch.testing.assert_close(loss.double(), expected, equal_nan=True, **tolerance)


def check_kept_graph(kernel: Any, exact: bool) -> None:
    """A graph that is kept gives its gradients again."""
    (hidden, weight, labels), _ = case("plain").inputs(device_of(kernel))
    loss = kernel.load()(hidden, weight, labels, exact=exact)
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(4.0), retain_graph=True)
    kept = [grad.clone() for grad in first]
    again = torch.autograd.grad(loss, (hidden, weight), torch.tensor(4.0))
    for one, other, copy in zip(first, again, kept, strict=True):
        assert torch.equal(one, copy)
        assert torch.equal(one, other)


def check_float16(kernel: Any) -> None:
    """As under a GradScaler: with a divisor and a factor that float16 cannot hold."""
    (hidden, weight, labels), _ = case("plain", F16).inputs(device_of(kernel))
    scale = torch.tensor(2.0**16, device=hidden.device)
    loss = kernel.load()(hidden, weight, labels, num_items_in_batch=2**21) * scale
    wide = original(hidden.double(), weight.double(), labels, num_items_in_batch=2**21) * 2.0**16
    for one, truth in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(wide, (hidden, weight)),
        strict=True,
    ):
        assert error(one, truth) < 2e-3
