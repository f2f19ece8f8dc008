"""The chart of an op: a line a shape, a panel a phase, a point for everybody who was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.report import tables
from hf_kernel_patch.cli import pictures
from hf_kernel_patch.cli.pictures import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]


def drawn(title: str, rows: list[Row], theme: Theme) -> Figure:
    """Shares of the measured limit; at the right ours, and its speed in ratio to eager's."""
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    shapes = list(dict.fromkeys(row["case"] for row in rows))
    names = pictures.in_order(row["provider"] for row in rows)
    wide = 0.075 * max(map(len, shapes)) + 3.6 * len(phases)
    lines = -(-len(names) // 4)
    figure = pictures.figure(theme, max(wide, 7.5), 1.5 + 0.22 * lines + 0.3 * len(shapes), title)
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, phase in zip(panels, phases, strict=True):
        chosen = [row for row in rows if row["phase"] == phase]
        handles |= _panel(axes, phase, chosen, shapes, names, theme)
    panels[0].set_yticks(range(len(shapes)), shapes)
    panels[0].set_ylim(len(shapes) - 0.4, -0.9)
    pictures.legend(figure, theme, [handles[name] for name in names], names)
    return figure


def _panel(
    axes: Axes, phase: str, rows: list[Row], shapes: list[str], names: list[str], theme: Theme
) -> dict[str, Any]:
    """One phase; name -> what stands for it in the legend."""
    colours, chosen = pictures.colours(names, theme), pictures.meant(names)
    handles: dict[str, Any] = {}
    pictures.dress(axes, theme, phase)
    for name in names:
        found = [row for row in rows if row["provider"] == name]
        strong, form = name == chosen, pictures.marker(name)
        handles[name] = axes.scatter(
            [row["share"] * 100 for row in found],
            [shapes.index(row["case"]) for row in found],
            s=64 if strong else 130 if form == "|" else 30,
            color=colours[name],
            marker=form,
            zorder=4 if strong else 3,
            linewidths=2.5 if form == "|" else 0,
        )
    for place, shape in enumerate(shapes):
        held = {row["provider"]: row for row in rows if row["case"] == shape}
        if held:
            shares = [row["share"] * 100 for row in held.values()]
            axes.hlines(place, min(shares), max(shares), color=theme.grid, linewidth=2, zorder=2)
        axes.text(
            1.02,
            place,
            _label(held, chosen),
            transform=axes.get_yaxis_transform(),
            color=theme.text,
            fontsize=pictures.FONT,
            va="center",
        )
    base = tables.baseline(names)
    head = "ours" if base is None else f"ours, x {base}"
    axes.text(
        1.02,
        -0.75,
        head,
        transform=axes.get_yaxis_transform(),
        color=theme.faint,
        fontsize=pictures.FONT,
        va="center",
    )
    widest = max(row["share"] for row in rows) * 100
    axes.set(xlabel="% of the measured limit", xlim=(-0.03 * widest, 1.06 * widest))
    return handles


def _label(held: dict[str, Row], chosen: str | None) -> str:
    """The share of ours, and eager's time over ours."""
    if chosen not in held:
        return ""
    ours, base = held[chosen], tables.baseline(held)
    text = f"{tables.number(ours['share'] * 100)}%"
    if base is not None and ours["median_s"]:
        text += f"  {tables.number(held[base]['median_s'] / ours['median_s'])}x"
        if base != "eager":
            text += f" {base}"
    return text
