"""Whole models: a training step and greedy decoding, every variant in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import processes
from benchmarks.measure.environment import header, slug
from benchmarks.report import results
from benchmarks.workloads import models, variants

Row = dict[str, Any]
#: On a CPU the variants stay and take turns; a training step has its own repetitions elsewhere.
_ROUNDS = 3


def sizes(kind: str, device: str, quick: bool) -> dict[str, int]:
    """The defaults of a run, by what the device can do."""
    cpu = device == "cpu"
    if kind == "e2e":
        batch, length = (2, 16) if quick else (1, 128) if cpu else (4, 2048)
        steps, warmup = (1, 0) if quick else (1, 1) if cpu else (10, 3)
        return {"batch": batch, "length": length, "steps": steps, "warmup": warmup}
    prompt, new = (8, 4) if quick else (64, 16) if cpu else (512, 64)
    return {"batch": 1, "prompt": prompt, "new": new, "warmup": 0 if quick else 1}


def run(
    kind: str,
    model: str,
    device: str,
    dtype: str,
    out: Path,
    *,
    quick: bool = False,
    layers: int | None = None,
    only: tuple[str, ...] = (),
    include: str = "auto",
    loss_left: bool = False,
    adamw: bool = False,
    limit: float = 400.0,
    batches: tuple[int, ...] = (),
    told: Callable[[Row], None] = lambda row: None,
    **changed: int | None,
) -> tuple[dict[str, Any], Path]:
    """Measure the variants of a model and write the result; ``kind`` is "e2e" or "decode".

    ``changed`` are sizes to take instead of the defaults, None for the default, and ``batches`` are
    measured one after the other. The result is written after each, so that one that hangs loses no
    other.
    """
    config = models.config(model, device, quick, layers)
    given = sizes(kind, device, quick) | {k: v for k, v in changed.items() if v is not None}
    batches = batches or (given.pop("batch"),)
    given.pop("batch", None)
    job = {
        "kind": {"e2e": "train", "decode": "decode"}[kind],
        "device": device,
        "dtype": dtype,
        "config": config,
        "include": include,
        "loss_left": loss_left,
        "adamw": adamw,
        "quick": quick,
        **given,
    }
    wanted, missing = _variants(kind, config, device, only)
    result = header(kind, device, dtype) | {
        "absent": missing,
        "config": config,
        "changes": models.changes(model, config),
        "options": {
            **{key: job[key] for key in ("include", "loss_left", "adamw", *given)},
            "batches": batches,
        },
        "rows": [],
    }
    shape = ["-".join(["b" + str(batches[0]), *map(str, batches[1:])])]
    shape += ["without-loss"] * loss_left + ["adamw"] * adamw
    name = slug("-".join([kind, model, *shape, *(["quick"] if quick else [])]))
    common = {
        "model": model,
        "layers": config["num_hidden_layers"],
        **({"prompt": given["prompt"]} if kind == "decode" else {"length": given["length"]}),
        "loss_of": "transformers" if loss_left else "each",
        "step": "with AdamW" if adamw else "forward and backward",
    }
    rows: list[Row] = result["rows"]

    def done(variant: str, batch: int, found: Row) -> None:
        row = {**common, "batch": batch, "variant": variant, **found}
        if "median_s" in found:
            row |= _rates(kind, row)
        if "tokens" in found:
            row["same_tokens"] = _agreeing(found["tokens"], _of(rows, batch))
        rows.append(row)
        # A table a batch, its variants in their order.
        rows.sort(key=lambda row: (batches.index(row["batch"]), wanted.index(row["variant"])))
        results.write(result, out, name)
        told(row)

    def checked(variant: str, found: Row) -> None:
        row = next(row for row in _of(rows, batches[0]) if row["variant"] == variant)
        if found.get("error") is not None:
            row["check_error"] = found["error"]
            return
        tokens = found.pop("checked_tokens")
        row |= found
        # Fewer than all where another path served this call than the timed ones.
        row["checked_tokens"] = _agreeing(tokens, [row])

    jobs = {variant: job | {"variant": variant} for variant in wanted}
    cpu, checks = device == "cpu", {}
    if kind == "decode":
        ours = [
            n for n in wanted if variants.VARIANTS[n].ours and not variants.VARIANTS[n].compiled
        ]
        checks = {variant: partial(checked, variant) for variant in ours}
    rounds = 1 if quick or (kind == "e2e" and not cpu) else _ROUNDS
    processes.run(jobs, batches, cpu, rounds, limit, done, checks)
    return result, results.write(result, out, name)


def _of(rows: list[Row], batch: int) -> list[Row]:
    return [row for row in rows if row["batch"] == batch]


def _variants(
    kind: str, config: dict[str, Any], device: str, only: tuple[str, ...]
) -> tuple[list[str], dict[str, str]]:
    """The variants to measure, and why the others are not."""
    found, missing = [], {}
    for name in variants.names(kind):
        if why := variants.absent(name, "num_experts" in config, device):
            missing[name] = why
        elif not only or name in only:
            found.append(name)
    return found, missing


def _rates(kind: str, row: Row) -> Row:
    seconds = row["median_s"]
    if kind == "e2e":
        return {"tokens_per_s": row["batch"] * row["length"] / seconds}
    rates = {"ms_per_token": seconds * 1e3, "tokens_per_s": row["batch"] / seconds}
    rates["preparation_s"] = row["first_s"] - row["generate_s"]
    if "bytes" in row:
        rates["bytes_ms"] = row["bytes"] / row["copy_gbs"] / 1e6
    return rates


def _agreeing(tokens: list[int], rows: list[Row]) -> int:
    """How many first tokens are those of the first variant that gave any."""
    first = next((row["tokens"] for row in rows if "tokens" in row), tokens)
    pairs = list(zip(tokens, first, strict=False))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
