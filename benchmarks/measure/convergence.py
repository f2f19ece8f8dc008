"""Small models that learn real text as they are and patched: do they learn the same?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import hf_kernel_patch
from benchmarks.measure.environment import DTYPES
from hf_kernel_patch import registry
from hf_kernel_patch.cli.demo import models
from hf_kernel_patch.cli.demo.text import batches, documentation
from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching.lookup import exists_here
from hf_kernel_patch.recognition import known

Row = dict[str, Any]
MODELS = ("llama", "qwen3_moe")
#: The last is the yardstick: as it is, from weights of which one differs by one rounding.
VARIANTS = EAGER, PATCHED, NUDGED = "eager", "patched", "eager, one weight a rounding away"
LOSS = "linear_cross_entropy"


def sizes(device: str, quick: bool) -> dict[str, int]:
    """Steps, rows of a batch and their length."""
    if quick:
        return {"steps": 3, "batch": 2, "length": 16}
    return {"steps": 300, "batch": 4, "length": 64} if device == "cpu" else _ON_DEVICE


_ON_DEVICE = {"steps": 400, "batch": 16, "length": 256}


def kernels(model: str, device: str) -> tuple[str, ...]:
    """Those that the model has places for: what "auto" takes on the device, and the loss."""
    ops = {known()[t.code].op for t in architectures()[model].sites if exists_here(t)}
    found: dict[str, str] = {}
    for kernel in sorted(registry.kernels().values(), key=lambda one: one.device == "any"):
        runs = registry.unavailable(kernel) is None and kernel.device in ("any", device)
        if kernel.op in ops and runs and (device in kernel.default_on or kernel.op == LOSS):
            found.setdefault(kernel.op, kernel.kernel_id)
    return tuple(found.values())


def run(
    device: str,
    dtype: str,
    given: dict[str, int],
    told: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """A row for every model and run: its losses, and how far they are from the eager run's."""
    steps, batch, length = given["steps"], given["batch"], given["length"]
    data = batches(documentation(), steps, batch, length, seed=0).to(device)
    rows: list[Row] = []
    for name in MODELS:
        eager: list[float] = []
        for variant in VARIANTS:
            row = {"case": name, "variant": variant, **given, "error": None}
            model = models.build(name, models.SMALL, 0, device, str(DTYPES[dtype])[6:])
            if variant == NUDGED:
                _nudge(model)
            include = kernels(name, device) if variant == PATCHED else None
            with hf_kernel_patch.patched(include, models=name, exclude=()) as report:
                row["losses"] = _train(model, data)
            if variant == PATCHED:
                row["patch"] = report.summary()
            eager = eager or row["losses"]
            apart = [abs(a - b) for a, b in zip(row["losses"], eager, strict=True)]
            row |= {"largest": max(apart), "mean": sum(apart) / len(apart)}
            rows.append(row)
            told(row)
    return rows


def _train(model: Any, data: torch.Tensor) -> list[float]:
    """The loss of every step of AdamW, with a short ramp of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step, ids in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@torch.no_grad()
def _nudge(model: Any) -> None:
    """Move one weight to the next number of its dtype."""
    weight = model.model.embed_tokens.weight
    first = weight[ord("e"), :1]
    first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
