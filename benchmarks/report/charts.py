"""One chart a section: shares of the limit, tokens a second, milliseconds a token, losses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import tables

Row = dict[str, Any]
#: By kind: the figure of a row, its scale, and the axis that it is drawn on.
_FIGURES: dict[str, tuple[str, float, str]] = {
    "ops": ("share", 100.0, "% of the measured limit"),
    "launch": ("median_s", 1e6, "host time of a call, us"),
    "e2e": ("tokens_per_s", 1e-3, "thousand tokens a second"),
}


def draw(kind: str, title: str, rows: list[Row], path: Path) -> bool:
    """Write a chart of a section; False where there is nothing to draw."""
    if kind == "convergence":
        return _curves(title, rows, path)
    if kind == "decode":
        return _decoding(title, rows, path)
    if kind not in _FIGURES:
        return False
    key, scale, axis = _FIGURES[kind]
    bars = {(_group(kind, row), _name(row)): row[key] * scale for row in rows if key in row}
    if not bars:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.16 * len(bars)), 4.5))
    axes = figure.subplots()
    _bars(axes, bars, axis)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return True


def _bars(
    axes: Any, bars: dict[tuple[str, str], float], axis: str, known: Iterable[str] = ()
) -> list[str]:
    """Draw the values by group and name; the groups. The colours are in the order of ``known``."""
    groups = list(dict.fromkeys(group for group, _ in bars))
    names = list(dict.fromkeys(name for _, name in bars))
    colours = {name: f"C{place}" for place, name in enumerate(dict.fromkeys([*known, *names]))}
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        found = [(i, bars[group, name]) for i, group in enumerate(groups) if (group, name) in bars]
        left = [i + (place - (len(names) - 1) / 2) * width for i, _ in found]
        heights = [value for _, value in found]
        drawn = axes.bar(left, heights, width, label=name, color=colours[name])
        labels = [tables.number(value) for _, value in found]
        axes.bar_label(drawn, labels, fontsize=6, rotation=90, padding=2)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel(axis)
    axes.margins(y=0.15)
    return groups


def _decoding(title: str, rows: list[Row], path: Path) -> bool:
    """Tokens a second by batch, and beside it the time of a token and of the bytes it reads."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "ms_per_token" in row]
    if not rows:
        return False
    rows = sorted(rows, key=lambda row: (row["layers"], row["prompt"], row["batch"]))
    sizes = {(row["layers"], row["prompt"]) for row in rows}

    def group(row: Row) -> str:
        more = f"\n{row['layers']} layers, prompt {row['prompt']}" if len(sizes) > 1 else ""
        return f"batch {row['batch']}{more}"

    rates = {
        (group(row), row["variant"]): row["tokens_per_s"]
        for row in rows
        if row["variant"] != "loop"  # it decodes nothing
    }
    times = {(group(row), row["variant"]): row["ms_per_token"] for row in rows}
    figure = Figure(figsize=(max(10.0, 0.4 * len(times)), 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    known = [row["variant"] for row in rows]
    if rates:
        _bars(left, rates, "tokens a second", known)
        left.set_yscale("log")
    groups = _bars(right, times, "ms a token", known)
    least = {group(row): row["bytes_ms"] for row in rows if "bytes_ms" in row}
    if least:
        places = [groups.index(name) for name in least]
        right.hlines(
            list(least.values()),
            [place - 0.42 for place in places],
            [place + 0.42 for place in places],
            colors="black",
            linestyles="dotted",
            label="time of the bytes read",
        )
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _curves(title: str, rows: list[Row], path: Path) -> bool:
    """By model: the loss of every step, and its distance from the eager run's."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(5 * len(names), 6), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for place, name in enumerate(names):
        chosen = [row for row in rows if row["case"] == name]
        eager = chosen[0]["losses"]
        steps = range(1, len(eager) + 1)
        for row, style in zip(chosen, ("C0-", "C1--", "C2:"), strict=True):
            axes[0][place].plot(steps, row["losses"], style, label=row["variant"])
            if row is not chosen[0]:
                apart = [abs(a - b) for a, b in zip(row["losses"], eager, strict=True)]
                axes[1][place].plot(steps, apart, style, label=row["variant"], linewidth=1)
        axes[0][place].set(title=name, ylabel="loss (nats a byte)")
        axes[1][place].set(xlabel="step", ylabel="distance from eager", yscale="log")
        axes[0][place].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _group(kind: str, row: Row) -> str:
    if kind == "ops":
        return f"{row['case']}\n{row['phase']}"
    if kind == "launch":
        return str(row["op"])
    loss = ", loss left" if row.get("loss_of") == "transformers" else ""
    return f"batch {row['batch']}{loss}"


def _name(row: Row) -> str:
    return str(row.get("provider") or row["variant"])
