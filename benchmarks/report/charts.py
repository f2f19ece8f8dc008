"""One chart a section, for light and for dark pages: shares of the limit, speeds, times, losses."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.report import points, tables
from hf_kernel_patch.cli import pictures
from hf_kernel_patch.cli.pictures import DARK, LIGHT, Bar, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
#: Steps of which the distance of two loss curves is the median.
WINDOW = 9


def draw(kind: str, title: str, rows: list[Row], path: Path) -> list[Path]:
    """Write a section's charts, light and dark; none where there is nothing to draw."""
    drawn = _KINDS.get(kind)
    rows = [row for row in rows if not row.get("error")]
    if drawn is None or not rows:
        return []
    return save(path, lambda theme: drawn(title, rows, theme))


def save(path: Path, drawn: Callable[[Theme], Figure | None]) -> list[Path]:
    """Write a picture for light pages to ``path`` and one for dark pages beside it."""
    written = []
    for theme, to in ((LIGHT, path), (DARK, dark(path))):
        figure = drawn(theme)
        if figure is not None:
            to.parent.mkdir(parents=True, exist_ok=True)
            _write(figure, to)
            written.append(to)
    return written


def dark(path: Path) -> Path:
    """Where the dark variant of a picture is."""
    return path.with_stem(f"{path.stem}-dark")


def _write(figure: Figure, path: Path) -> None:
    """As a PNG of few colours, which takes a third of the bytes."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=110)
    few = (
        Image.open(whole)
        .convert("RGB")
        .quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    )
    few.save(path, format="PNG", optimize=True)


def _ops(title: str, rows: list[Row], theme: Theme) -> Figure | None:
    rows = [row for row in rows if "share" in row]
    return points.drawn(title, rows, theme) if rows else None


def _launch(title: str, rows: list[Row], theme: Theme) -> Figure:
    """Host time of a call by op."""
    groups = grouped(rows, lambda row: str(row["op"]), name="provider")
    figure = pictures.figure(theme, 8, 1 + 0.27 * (len(rows) + 1.5 * len(groups)), title)
    held = [
        (head, bars(found, "median_s", 1e6, " us", inverse=True)) for head, found in groups.items()
    ]
    pictures.bars(figure.subplots(), theme, held, "host time of a call, and how many times as fast")
    return figure


def _steps(title: str, rows: list[Row], theme: Theme) -> Figure:
    """Tokens a second and memory of a training step."""

    def group(row: Row) -> str:
        loss = ", the loss stays transformers'" if row.get("loss_of") == "transformers" else ""
        return f"{row['layers']} layers, batch {row['batch']} x {row['length']}{loss}"

    groups = grouped(rows, group)
    figure = pictures.figure(theme, 10.5, 1.1 + 0.3 * (len(rows) + 1.5 * len(groups)), title)
    left, right = figure.subplots(1, 2)
    for axes, key, scale, unit, words in (
        (left, "tokens_per_s", 1e-3, "k", "thousand tokens a second"),
        (right, "peak_gib", 1.0, " GiB", "peak memory"),
    ):
        held = [(head, bars(found, key, scale, unit)) for head, found in groups.items()]
        base = tables.baseline(row["variant"] for row in rows)
        pictures.bars(axes, theme, held, f"{words}, and the ratio to {base}" if base else words)
    return figure


def _decoding(title: str, rows: list[Row], theme: Theme) -> Figure | None:
    """Milliseconds a token by batch, and the time of the bytes that it reads."""
    rows = [row for row in rows if "ms_per_token" in row]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: (row["layers"], row["prompt"], row["batch"]))

    def group(row: Row) -> str:
        return f"{row['layers']} layers, prompt {row['prompt']}, batch {row['batch']}"

    groups = grouped(rows, group)
    figure = pictures.figure(theme, 8.5, 1.1 + 0.3 * (len(rows) + 1.5 * len(groups)), title)
    axes = figure.subplots()
    held = [(head, token_times(found)) for head, found in groups.items()]
    base = tables.baseline(row["variant"] for row in rows)
    words = f", and how many times as fast as {base}" if base else ""
    words = f"time of a token, tokens a second{words}"
    places = pictures.bars(axes, theme, held, words)
    least = {group(row): row["bytes_ms"] for row in rows if "bytes_ms" in row}
    for number, (head, value) in enumerate(least.items()):
        name = "" if number else "time of the bytes read"
        axes.vlines(value, *places[head], colors=theme.text, linestyles="dotted", label=name)
    if least:
        axes.legend(frameon=False, fontsize=pictures.FONT, labelcolor=theme.text)
    return figure


def _curves(title: str, rows: list[Row], theme: Theme) -> Figure:
    """By model: the loss of every step, and its distance from the eager run's."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure = pictures.figure(theme, 5 * len(names), 5.6, title)
    axes = figure.subplots(2, len(names), squeeze=False)
    for place, name in enumerate(names):
        chosen = [row for row in rows if row["case"] == name]
        colours = pictures.colours([row["variant"] for row in chosen], theme)
        eager = chosen[0]["losses"]
        steps = range(1, len(eager) + 1)
        for row, width in zip(chosen, (3.5, 1.2, 2.4)):
            colour, label = colours[row["variant"]], row["variant"]
            over = 3 if pictures.is_ours(label) else 2
            style = {"color": colour, "label": label, "linewidth": width, "zorder": over}
            axes[0][place].plot(steps, row["losses"], **style)
            if row is not chosen[0]:
                apart = [abs(a - b) for a, b in zip(row["losses"], eager, strict=True)]
                axes[1][place].plot(steps, _smooth(apart), **style)
        pictures.dress(axes[0][place], theme, f"{name}: loss (nats a byte)", grid="y")
        words = f"distance from eager, median of {WINDOW} steps"
        pictures.dress(axes[1][place], theme, words, grid="y")
        axes[1][place].set_xlabel("step")
        if any(any(line.get_ydata()) for line in axes[1][place].lines):  # not all equal to the bit
            axes[1][place].set_yscale("log")
        axes[0][place].legend(frameon=False, fontsize=pictures.FONT, labelcolor=theme.text)
    return figure


_KINDS: dict[str, Callable[[str, list[Row], Theme], Figure | None]] = {
    "ops": _ops,
    "launch": _launch,
    "e2e": _steps,
    "decode": _decoding,
    "convergence": _curves,
}


def grouped(
    rows: Iterable[Row], group: Callable[[Row], str], name: str = "variant"
) -> dict[str, dict[str, Row]]:
    """Group -> name -> row, the names in the order of every chart."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(group(row), {})[row[name]] = row
    return {
        head: {one: held[one] for one in pictures.in_order(held)} for head, held in found.items()
    }


def bars(
    found: dict[str, Row],
    key: str,
    scale: float,
    unit: str,
    inverse: bool = False,
    more: Callable[[Row], str] = lambda row: "",
) -> list[Bar]:
    """A bar each, labelled with its value and its ratio to that of transformers as it is.

    With ``inverse`` the ratio is the other one: of times, how many times as fast.
    """
    base = tables.baseline(found)
    made = []
    for name, row in found.items():
        label = f"{tables.number(row[key] * scale)}{unit}{more(row)}"
        if base is not None and name not in (base, "loop"):  # the loop decodes nothing
            ratio = row[key] / found[base][key]
            label += f"   {1 / ratio if inverse else ratio:.2f}x"
        made.append(Bar(name, row[key] * scale, label))
    return made


def token_times(found: dict[str, Row]) -> list[Bar]:
    """The bars of decoding: milliseconds a token."""
    return bars(found, "ms_per_token", 1.0, " ms", inverse=True, more=_rate)


def _rate(row: Row) -> str:
    return "" if row["variant"] == "loop" else f", {tables.number(row['tokens_per_s'])}/s"


def _smooth(values: list[float]) -> list[float]:
    half = WINDOW // 2
    return [median(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]
