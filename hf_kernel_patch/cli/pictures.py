"""How every picture of the project looks: the colours, who has which, axes and bars.

The demo draws with it, and so do the charts of the benchmarks and the picture of the README. What
is ours has one strong colour everywhere; all others are muted, and always in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Whoever draws nothing needs no matplotlib, the type checker neither.
Axes = Any
Figure = Any


@dataclass(frozen=True)
class Theme:
    """The colours of a page, and ours on it."""

    background: str
    text: str
    faint: str
    grid: str
    ours: str
    #: What is ours too, beside the one that is meant.
    also_ours: str


@dataclass(frozen=True)
class Bar:
    """One bar: whose it is, how long, what is written at its end, and (lowest, highest)."""

    name: str
    value: float
    label: str
    spread: tuple[float, float] | None = None


LIGHT = Theme("#ffffff", "#1f2328", "#656d76", "#e4e7eb", "#e8590c", "#f5b183")
DARK = Theme("#0d1117", "#e6edf3", "#9198a1", "#2b323b", "#ff7b29", "#9c5630")
#: Everybody else, in the order of legends and bars: a muted colour and a marker each.
PEERS: dict[str, tuple[str, str]] = {
    "as it is": ("#8f979f", "|"),
    "eager": ("#8f979f", "|"),
    "eager, one weight a rounding away": ("#a79bbd", "|"),
    "grouped_mm": ("#b5a98c", "s"),
    "batched_mm": ("#d0c8b4", "p"),
    "torch": ("#8ba3bd", "D"),
    "liger": ("#7fb0a5", "^"),
    "scattermoe": ("#a3b48c", "<"),
    "cce": ("#c3a0ad", ">"),
    "compile": ("#a79bbd", "v"),
    "static": ("#a79bbd", "v"),
    "graph": ("#7d8ea0", "P"),
    "loop": ("#c3c8ce", "X"),
}
_UNKNOWN = ("#b0b5bb", "h")
#: The beginnings of our own names, the one that is meant first.
_OURS = ("ours", "patched", "cuda_fused_", "npu_fused_", "torch_fused_")
FONT = 9.0


def is_ours(name: str) -> bool:
    """Whether a variant or a provider is of this project."""
    return name.startswith(_OURS)


def meant(names: Iterable[str]) -> str | None:
    """Of a chart's names the one of ours that the chart is about."""
    found = [name for name in names if is_ours(name)]
    return min(found, key=lambda name: (_place(name), len(name)), default=None)


def in_order(names: Iterable[str]) -> list[str]:
    """The names as every legend has them: the others first, then ours, the one meant at the end."""
    known = list(dict.fromkeys(names))
    chosen = meant(known)
    order = {name: place for place, name in enumerate(PEERS)}

    def place(name: str) -> tuple[Any, ...]:
        if is_ours(name):
            return (2, name == chosen, -_place(name), name)
        return (0, order[name]) if name in order else (1, name)

    return sorted(known, key=place)


def colours(names: Iterable[str], theme: Theme) -> dict[str, str]:
    """Name -> its colour in a chart that has all of the names."""
    known = list(names)
    chosen = meant(known)
    return {
        name: (theme.ours if name == chosen else theme.also_ours)
        if is_ours(name)
        else PEERS.get(name, _UNKNOWN)[0]
        for name in known
    }


def marker(name: str) -> str:
    """The marker of a name, for charts of points."""
    if is_ours(name):
        return "d" if "," in name else "o"  # a comma goes before options
    return PEERS.get(name, _UNKNOWN)[1]


def figure(theme: Theme, width: float, height: float, title: str = "") -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    made: Any = Figure(figsize=(width, height), layout="constrained", facecolor=theme.background)
    if title:
        style = {"color": theme.text, "fontsize": FONT + 2, "fontweight": "bold"}
        made.suptitle(title, x=0.01, ha="left", **style)
    made.get_layout_engine().set(h_pad=0.09, w_pad=0.06)
    return made


def dress(axes: Axes, theme: Theme, title: str = "", grid: str = "x") -> None:
    """Take the frame away, and give the rest its colours."""
    axes.set_facecolor(theme.background)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=theme.faint, labelcolor=theme.text, labelsize=FONT)
    axes.tick_params(which="both", length=0)
    axes.xaxis.label.set(color=theme.faint, fontsize=FONT)
    axes.yaxis.label.set(color=theme.faint, fontsize=FONT)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", color=theme.text, fontsize=FONT + 1)


def legend(figure: Figure, theme: Theme, handles: Sequence[Any], names: Sequence[str]) -> None:
    """The names in lines below everything."""
    figure.legend(
        handles,
        names,
        loc="outside lower left",
        ncols=min(len(names), 4),
        fontsize=FONT,
        labelcolor=theme.text,
        frameon=False,
    )


def bars(
    axes: Axes,
    theme: Theme,
    groups: Sequence[tuple[str, Sequence[Bar]]],
    title: str = "",
) -> dict[str, tuple[float, float]]:
    """Draw bars from left to right, group below group; where each group begins and ends.

    A name stands at the left of each bar, its label at the right end.
    """
    ends = [max(bar.value, *(bar.spread or (0,))) for _, held in groups for bar in held]
    height, ticks, places = 0.0, [], {}
    for head, held in groups:
        if head:
            text = axes.text(0, height, head, color=theme.faint, fontsize=FONT, va="center")
            text.set_in_layout(False)  # may be longer than its panel is wide
            height += 1
        names = [bar.name for bar in held]
        chosen, painted = meant(names), colours(names, theme)
        begin = height
        for bar in held:
            _bar(axes, theme, bar, height, painted[bar.name], bar.name == chosen)
            ticks.append((height, bar.name, bar.name == chosen))
            height += 1
        places[head] = (begin - 0.5, height - 0.5)
        height += 0.5
    dress(axes, theme, title)
    axes.set_yticks([place for place, _, _ in ticks], [name for _, name, _ in ticks])
    for text, (_, _, strong) in zip(axes.get_yticklabels(), ticks, strict=True):
        text.set_fontweight("bold" if strong else "normal")
    axes.set(ylim=(max(height - 0.9, 3.0), -0.7), xlim=(0, max(ends, default=0) * 1.4 or 1))
    axes.xaxis.set_ticklabels([])
    axes.grid(visible=False)
    return places


def _bar(axes: Axes, theme: Theme, bar: Bar, height: float, colour: str, strong: bool) -> None:
    """One bar with its spread and its label."""
    axes.barh(height, bar.value, height=0.72, color=colour)
    end = bar.value
    if bar.spread:
        axes.plot([*bar.spread], [height, height], color=theme.text, linewidth=1.2)
        end = max(end, *bar.spread)
    label = axes.annotate(
        bar.label,
        (end, height),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=theme.text,
        fontsize=FONT,
        fontweight="bold" if strong else "normal",
    )
    label.set_in_layout(False)


def _place(name: str) -> int:
    return next(place for place, one in enumerate(_OURS) if name.startswith(one))
