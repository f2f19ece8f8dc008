"""Short tables for the end of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def seconds(value: float) -> str:
    """A time in three digits and its unit."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if value * scale < 1000:
            return f"{value * scale:.3g}{unit}"
    return f"{value:.3g}s"


def number(value: float) -> str:
    """Three digits, and thousands as they are."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(row: Row) -> str:
    """Time and share of the limit."""
    if row["error"]:
        return row["error"].split(":")[0][:12]
    share = f" {row['share']:.0%}" if "share" in row else ""
    return seconds(row["median_s"]) + share


def baseline(names: Iterable[str]) -> str | None:
    """Of those measured the one that is transformers as it is, which ratios are to."""
    known = set(names)
    return next((name for name in ("eager", "grouped_mm") if name in known), None)


def columns(rows: Iterable[Row], key: str = "provider") -> list[str]:
    """The providers in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """By shape and phase: a row a provider."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["case"], row["phase"]), {})[row["provider"]] = row
    return found


def of(result: dict[str, Any]) -> list[Table]:
    """Of a training step one, of ops one each: by shape and phase, a column a provider."""
    rows = result["rows"]
    if result["kind"] == "e2e":
        return [_of_steps(rows)]
    return [_of_op(op, [row for row in rows if row["op"] == op]) for op in columns(rows, "op")]


def _of_op(op: str, rows: list[Row]) -> Table:
    names = columns(rows)
    table = plain(op, "shape", "phase", *(_short(name) for name in names))
    for (case, phase), found in grouped(rows).items():
        cells = [cell(found[name]) if name in found else "-" for name in names]
        table.add_row(case, phase[:3], *cells)
    if any(row.get("errors") for row in rows):
        table.add_row("error", "max", *(_largest_error(rows, name) for name in names))
    return table


def _largest_error(rows: list[Row], provider: str) -> str:
    found = [
        error
        for row in rows
        if row["provider"] == provider
        for error in row.get("errors", {}).values()
    ]
    # max() would pass over NaN.
    return "nan" if any(e != e for e in found) else f"{max(found):.0e}" if found else ""


def failures(rows: list[Row], most: int = 8) -> list[str]:
    """One line for each provider that failed, and where first."""
    found: dict[str, str] = {}
    for row in rows:
        if row["error"]:
            place = " ".join(row[key] for key in ("op", "case", "phase", "variant") if key in row)
            name = row.get("provider", "")
            found.setdefault(f"{name} {row['error'][:90]}", f"{name} {place}: {row['error'][:120]}")
    return list(found.values())[:most]


def _of_steps(rows: list[Row]) -> Table:
    """A line a variant."""
    title = "e2e"
    if rows:
        title += f" {rows[0]['model']}, {rows[0]['layers']} layers, batch {rows[0]['batch']}"
    table = plain(title, "variant", "tokens/s", "GiB", "first", "loss, gradient norm")
    for row in rows:
        table.add_row(row["variant"], *step_cells(row))
    return table


def step_cells(row: Row) -> list[str]:
    """Rate, memory, first call, and what shows that it computed the same."""
    if row["error"]:
        return [row["error"][:60], "", "", ""]
    rate, same = f"{row['tokens_per_s']:.0f}", f"{row['loss']:.4f}, {row['grad_norm']:.4g}"
    return [rate, f"{row['peak_gib']:.2f}", seconds(row["first_s"]), same]


def plain(title: str, *names: str) -> Table:
    """An empty table, its first column to the left."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place < 1 else "right", no_wrap=True)
    return table


def _short(name: str) -> str:
    """A kernel's id without what all ids share."""
    return name.replace("_fused_", " ").replace("linear_cross_entropy", "lce")
