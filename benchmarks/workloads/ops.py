"""The ops: their inputs, their truth in float64, and the least work that each phase can do.

An op's arguments come in the order in which a kernel's function takes them, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hf_kernel_patch.ops.add_rms_norm import reference as add_rms_norm
from hf_kernel_patch.ops.linear_cross_entropy import reference as loss
from hf_kernel_patch.ops.moe import reference as moe
from hf_kernel_patch.ops.qk_norm_rope import reference as qk_norm_rope
from hf_kernel_patch.ops.rms_norm import reference as rms_norm
from hf_kernel_patch.ops.rope import reference as rope
from hf_kernel_patch.ops.swiglu import reference as swiglu

#: The phases, each timed apart. "forward" records gradients, "inference" does not, "backward" is
#: the backward alone, "step" both together.
FORWARDS = ("forward", "inference")
EPS = 1e-6
WIDE = torch.float64
Arguments = SimpleNamespace
Draw = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Work:
    """The fewest elements that a phase reads and writes, and its fewest operations."""

    elements: float
    operations: float = 0.0


@dataclass(frozen=True)
class Op:
    """``inputs(sizes, draw)`` gives the arguments, ``truth`` takes them and gives the outputs."""

    inputs: Callable[[dict[str, int], Draw], dict[str, Any]]
    truth: Callable[..., Any]
    work: Callable[[dict[str, int], Arguments, str], Work]
    differentiable: tuple[str, ...]
    outputs: tuple[str, ...] = ("out",)
    #: Leaves that a module owns.
    parameters: tuple[str, ...] = ("weight",)
    phases: tuple[str, ...] = ("forward", "backward")


def _norm_inputs(sizes: dict[str, int], draw: Draw) -> dict[str, Any]:
    rows, width = sizes["rows"], sizes["width"]
    return {
        "x": draw(rows, width),
        "weight": 1 + 0.1 * draw(width),
        "eps": EPS,
        "offset": 0.0,
        "cast_first": True,
    }


def _add_norm_inputs(sizes: dict[str, int], draw: Draw) -> dict[str, Any]:
    x, *rest = _norm_inputs(sizes, draw).items()
    return dict([x, ("residual", draw(sizes["rows"], sizes["width"])), *rest])


def _norm_work(forward: int, backward: int) -> Callable[..., Work]:
    """Of passes over (rows, width), and the weight, whose gradient is written too."""

    def work(sizes: dict[str, int], a: Arguments, phase: str) -> Work:
        elements = sizes["rows"] * sizes["width"]
        if phase in FORWARDS:
            return Work(forward * elements + sizes["width"])
        return Work(backward * elements + 2 * sizes["width"])

    return work


def _rope_inputs(sizes: dict[str, int], draw: Draw) -> dict[str, Any]:
    """q and k as attention has them: (B, heads, S, D) over the memory of (B, S, heads, D)."""
    given = _heads(sizes, draw)
    given |= {name: given[name].transpose(1, 2) for name in "qk"}
    if "pairs" not in sizes:
        return given
    pairs = ("interleaved", "interleaved_to_halves")[sizes["pairs"]]
    return given | {"unsqueeze_dim": 1, "cast": False, "pairs": pairs, "angles": "first_half"}


def _heads(sizes: dict[str, int], draw: Draw) -> dict[str, Any]:
    """q and k as projected, (B, S, heads, D), with cos and sin, (1, S, D)."""
    batch, length, head = sizes["B"], sizes["S"], sizes["d"]
    q, k = (draw(batch, length, sizes[name], head) for name in "qk")
    frequencies = 10000 ** (-torch.arange(0, head, 2, device=q.device) / head)
    angles = torch.outer(torch.arange(length, device=q.device), frequencies).repeat(1, 2)[None]
    return {"q": q, "k": k, "cos": angles.cos().to(q.dtype), "sin": angles.sin().to(q.dtype)}


def _rope_work(sizes: dict[str, int], a: Arguments, phase: str) -> Work:
    return Work(2 * (a.q.numel() + a.k.numel()) + a.cos.numel() + a.sin.numel())


def _qk_inputs(sizes: dict[str, int], draw: Draw) -> dict[str, Any]:
    given = _heads(sizes, draw)
    weights = {f"{name}_weight": 1 + 0.1 * draw(sizes["d"]) for name in "qk"}
    turn = {name: given.pop(name) for name in ("cos", "sin")}
    return given | weights | {"eps": EPS} | turn


def _qk_work(sizes: dict[str, int], a: Arguments, phase: str) -> Work:
    forward = phase in FORWARDS
    weights = (1 if forward else 2) * 2 * sizes["d"]
    passes = 2 if forward else 3
    return Work(passes * (a.q.numel() + a.k.numel()) + a.cos.numel() + a.sin.numel() + weights)


def _swiglu_inputs(sizes: dict[str, int], draw: Draw) -> dict[str, Any]:
    rows, width = sizes["rows"], sizes["width"]
    return {"gate": draw(rows, width), "up": draw(rows, width), "activation": "silu"}


def _swiglu_work(sizes: dict[str, int], a: Arguments, phase: str) -> Work:
    return Work((3 if phase in FORWARDS else 5) * a.gate.numel())


def _moe_inputs(sizes: dict[str, int], draw: Draw) -> dict[str, Any]:
    tokens, experts, hidden, width = (sizes[name] for name in "TEHI")
    scores = draw(tokens, experts).float()
    if sizes.get("skew"):  # half of the tokens take the first expert, none the last twenty
        scores[::2, 0], scores[:, -20:] = 100.0, -100.0
    best = scores.softmax(-1).topk(sizes["K"])
    return {
        "hidden": draw(tokens, hidden),
        "index": best.indices,
        "weights": (best.values / best.values.sum(-1, keepdim=True)).to(draw(1).dtype),
        "gate_up": draw(experts, 2 * width, hidden).mul_(0.02),
        "down": draw(experts, hidden, width).mul_(0.02),
        "activation": "silu",
    }


def _moe_truth(hidden: Any, index: Any, weights: Any, gate_up: Any, down: Any, act: str) -> Any:
    # Unbound, or every expert's gradient would be a tensor of all of them.
    return moe.moe(hidden, index, weights, gate_up.unbind(), down.unbind(), act, dtype=WIDE)


def _moe_work(sizes: dict[str, int], a: Arguments, phase: str) -> Work:
    expert = 3 * sizes["H"] * sizes["I"]
    used = int(a.index.unique().numel()) * expert
    operations = 2 * a.index.numel() * expert
    if phase in FORWARDS:
        return Work(2 * a.hidden.numel() + used, operations)
    return Work(4 * a.hidden.numel() + 2 * used, 3 * operations)


def _loss_inputs(sizes: dict[str, int], draw: Draw) -> dict[str, Any]:
    tokens, hidden, vocabulary = (sizes[name] for name in "THV")
    weight = draw(vocabulary, hidden).mul_(0.02)
    labels = torch.randint(0, vocabulary, (1, tokens), device=weight.device)
    return {"hidden": draw(1, tokens, hidden), "weight": weight, "labels": labels}


def _loss_truth(hidden: Any, weight: Any, labels: Any) -> Any:
    """A thousand rows at a time, each recomputed in the backward: no full logits in float64."""
    targets = loss.shifted(labels, None, -100)

    def part(rows: Any, weight: Any, target: Any) -> Any:
        options: dict[str, Any] = {"shift_labels": target, "num_items_in_batch": 1, "dtype": WIDE}
        return loss.linear_cross_entropy(rows[None], weight, None, **options)

    pairs = zip(hidden.flatten(0, 1).split(1024), targets.split(1024), strict=True)
    total = sum(
        checkpoint(part, rows, weight, target, use_reentrant=False) for rows, target in pairs
    )
    return total / loss.items(targets, None, -100)


def _loss_work(sizes: dict[str, int], a: Arguments, phase: str) -> Work:
    operations = 2 * sizes["T"] * sizes["H"] * sizes["V"]
    elements = a.hidden.numel() + a.weight.numel()
    return Work(elements, operations) if phase in FORWARDS else Work(2 * elements, 3 * operations)


def _widened(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments, dtype=WIDE)


OPS: dict[str, Op] = {
    "rms_norm": Op(_norm_inputs, _widened(rms_norm.rms_norm), _norm_work(2, 3), ("x", "weight")),
    "add_rms_norm": Op(
        _add_norm_inputs,
        _widened(add_rms_norm.add_rms_norm),
        _norm_work(4, 4),
        ("x", "residual", "weight"),
        outputs=("sum", "normed"),
    ),
    "rope": Op(
        _rope_inputs,
        _widened(rope.rope),
        _rope_work,
        ("q", "k"),
        outputs=("q_out", "k_out"),
        parameters=(),
    ),
    "qk_norm_rope": Op(
        _qk_inputs,
        _widened(qk_norm_rope.qk_norm_rope),
        _qk_work,
        ("q", "k", "q_weight", "k_weight"),
        outputs=("q_out", "k_out"),
        parameters=("q_weight", "k_weight"),
    ),
    "swiglu": Op(
        _swiglu_inputs, _widened(swiglu.swiglu), _swiglu_work, ("gate", "up"), parameters=()
    ),
    "moe": Op(
        _moe_inputs,
        _moe_truth,
        _moe_work,
        ("hidden", "weights", "gate_up", "down"),
        parameters=("gate_up", "down"),
        phases=("inference", "step"),
    ),
    "linear_cross_entropy": Op(
        _loss_inputs,
        _loss_truth,
        _loss_work,
        ("hidden", "weight"),
        outputs=("loss",),
        phases=("inference", "step"),
    ),
}
