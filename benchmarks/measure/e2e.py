"""Whole models: a training step and greedy decoding, every variant in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import processes
from benchmarks.measure.environment import header, slug
from benchmarks.report import results
from benchmarks.workloads import models, variants

Row = dict[str, Any]
#: Where every variant is one of these on a CPU, they stay and take turns.
_CPU_ROUNDS = 3


def sizes(kind: str, device: str, quick: bool) -> dict[str, int]:
    """The defaults of a run, by what the device can do."""
    cpu = device == "cpu"
    if kind == "e2e":
        batch, length = (2, 16) if quick else (1, 128) if cpu else (4, 2048)
        steps, warmup = (1, 0) if quick else (1, 1) if cpu else (10, 3)
        return {"batch": batch, "length": length, "steps": steps, "warmup": warmup}
    prompt, new = (8, 4) if quick else (64, 16) if cpu else (512, 64)
    return {"batch": 1, "prompt": prompt, "new": new, "warmup": 0 if quick else 1 if cpu else 2}


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
    told: Callable[[Row], None] = lambda row: None,
    **changed: int | None,
) -> tuple[dict[str, Any], Path]:
    """Measure the variants of a model and write the result; ``kind`` is "e2e" or "decode".

    ``changed`` are sizes to take instead of the defaults, None for the default. The result is
    written after each variant, so that one that hangs loses no other.
    """
    config = models.config(model, device, quick, layers)
    given = sizes(kind, device, quick) | {k: v for k, v in changed.items() if v is not None}
    job = {
        "kind": {"e2e": "train", "decode": "decode"}[kind],
        "device": device,
        "dtype": dtype,
        "config": config,
        "include": include,
        "loss_left": loss_left,
        "adamw": adamw,
        **given,
    }
    wanted, missing = _variants(config, device, only)
    result = header(kind, device, dtype) | {
        "absent": missing,
        "config": config,
        "changes": models.changes(model, config),
        "options": {key: job[key] for key in ("include", "loss_left", "adamw", *given)},
        "rows": [],
    }
    shape = [f"b{given['batch']}"] + ["without-loss"] * loss_left + ["adamw"] * adamw
    name = slug("-".join([kind, model, *shape, *(["quick"] if quick else [])]))
    common = {
        "model": model,
        "layers": config["num_hidden_layers"],
        "batch": given["batch"],
        **({"prompt": given["prompt"]} if kind == "decode" else {"length": given["length"]}),
        "loss_of": "transformers" if loss_left else "each",
        "step": "with AdamW" if adamw else "forward and backward",
    }

    def done(variant: str, found: Row) -> None:
        row = {**common, "variant": variant, **found}
        if "median_s" in found:
            row |= _rates(kind, given, found["median_s"])
        if "tokens" in found:
            row["same_tokens"] = _agreeing(found["tokens"], result["rows"])
        result["rows"].append(row)
        results.write(result, out, name)
        told(row)

    jobs = {variant: job | {"variant": variant} for variant in wanted}
    cpu = device == "cpu"
    processes.run(jobs, cpu, _CPU_ROUNDS if cpu and not quick else 1, limit, done)
    return result, results.write(result, out, name)


def _variants(
    config: dict[str, Any], device: str, only: tuple[str, ...]
) -> tuple[list[str], dict[str, str]]:
    """The variants to measure, and why the others are not."""
    found, missing = [], {}
    for name in variants.VARIANTS:
        if why := variants.absent(name, "num_experts" in config, device):
            missing[name] = why
        elif not only or name in only:
            found.append(name)
    return found, missing


def _rates(kind: str, given: dict[str, int], seconds: float) -> Row:
    if kind == "e2e":
        return {"tokens_per_s": given["batch"] * given["length"] / seconds}
    return {"ms_per_token": seconds * 1e3, "tokens_per_s": given["batch"] / seconds}


def _agreeing(tokens: list[int], rows: list[Row]) -> int:
    """How many first tokens are those of the first variant that gave any."""
    first = next((row["tokens"] for row in rows if "tokens" in row), tokens)
    pairs = list(zip(tokens, first, strict=False))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
