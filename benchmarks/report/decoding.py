"""The figures of decoding, as a table for the end of a run and for RESULTS.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table

from benchmarks.report import tables

Row = dict[str, Any]


def _bytes(row: Row) -> str:
    if "bytes_ms" not in row:
        return ""
    return f"{tables.number(row['bytes_ms'])}, {row['bytes_ms'] / row['ms_per_token']:.0%}"


def _memory(row: Row) -> str:
    if "decode_gib" in row:
        return f"{row['prefill_gib']:.2f}, {row['decode_gib']:.2f}"
    return f"{row['peak_gib']:.2f}"


def _first(row: Row) -> str:
    whole = tables.seconds(row["first_s"])
    if "preparation_s" not in row:
        return whole
    return f"{whole}, {tables.seconds(max(0.0, row['preparation_s']))}"


def _errors(row: Row) -> str:
    if row.get("check_error"):
        return row["check_error"].split(":")[0]
    if "logits_error" not in row:
        # The more exact copy did not fit.
        return f"{row['logits_apart']:.1e} apart" if "logits_apart" in row else ""
    return f"{row['logits_error']:.1e}, {row['logits_error_original']:.1e}"


def _milliseconds(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] * 1e3:.2f}" if key in row else ""


#: A column's name and short name, its text, and what the name means.
_COLUMNS: list[tuple[str, str, Callable[[Row], str], str]] = [
    ("tokens/s", "tokens/s", lambda row: tables.number(row["tokens_per_s"]), ""),
    ("ms a token", "ms/token", lambda row: f"{row['ms_per_token']:.2f}", ""),
    (
        "ms of the bytes",
        "bytes ms",
        _bytes,
        "weights and cache that a token has to read, over the bandwidth of a copy, and its share of"
        " the time; of experts as many as the batch can choose",
    ),
    ("ms a later token", "later", _milliseconds("later_s"), "from the ninth token on"),
    (
        "start ms",
        "start ms",
        _milliseconds("start_s"),
        "what the first eight tokens of every call take more than as many later ones, `generate`'s"
        " own preparations in it",
    ),
    ("prefill ms", "prefill ms", _milliseconds("prefill_s"), "a forward of the prompts"),
    (
        "first call",
        "first",
        _first,
        "the first `generate` of the process at this batch, and what it takes more than later ones",
    ),
    (
        "peak GiB",
        "GiB",
        _memory,
        "on an accelerator of the prefill, and of what follows it",
    ),
    (
        "first tokens as in eager",
        "same",
        lambda row: str(row["same_tokens"]) if "same_tokens" in row else "",
        "",
    ),
    (
        "error of the logits",
        "logits",
        _errors,
        "||logits - exact|| / ||exact|| of decoded tokens, of the patch and of the original given"
        " the same tokens; exact is the original in float32, of float32 in float64",
    ),
]


def tables_of(rows: list[Row]) -> list[Table]:
    """A line a batch and variant."""
    first = rows[0] if rows else {"model": "", "layers": 0, "prompt": 0}
    title = f"decode {first['model']}, {first['layers']} layers, prompt {first['prompt']}"
    table = tables.plain(title, "variant", "batch", *(short for _, short, _, _ in _COLUMNS))
    for row in rows:
        table.add_row(row["variant"], str(row["batch"]), *_cells(row))
    return [table]


def filled(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of a table, without the columns in which no row has anything."""
    named = ["layers", "batch", "prompt"]
    lines = [[*(str(row[key]) for key in named), row["variant"], *_cells(row)] for row in rows]
    head = [*named, "variant", *(name for name, _, _, _ in _COLUMNS)]
    kept = [place for place in range(len(head)) if any(line[place] for line in lines)]
    return [head[place] for place in kept], [[line[place] for place in kept] for line in lines]


def explained(rows: list[Row]) -> Iterable[str]:
    """What the names of the columns and of the variants mean, of those that are in the table."""
    head, _ = filled(rows)
    for name, _, _, meaning in _COLUMNS:
        if meaning and name in head:
            yield f"- {name}: {meaning}"
    variants = {row["variant"] for row in rows}
    for name, meaning in _VARIANTS.items():
        if name in variants:
            yield f"- {name}: {meaning}"


_VARIANTS = {
    "static": '`generate(cache_implementation="static")`, which compiles the steps',
    "graph": "one CUDA graph of a forward with a static cache, replayed without `generate`",
    "loop": "`generate` with a forward that computes nothing: what remains of it",
}


def _cells(row: Row) -> list[str]:
    if row["error"]:
        return [row["error"].split(":")[0][:30], *[""] * (len(_COLUMNS) - 1)]
    return [text(row) for _, _, text, _ in _COLUMNS]
