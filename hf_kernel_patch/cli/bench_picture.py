"""The picture of a benchmark: speed of every variant, and what each op gains."""

from __future__ import annotations

from pathlib import Path

from hf_kernel_patch.benchmarking.noise import Difference, Spread
from hf_kernel_patch.benchmarking.result import Benchmark, Measured
from hf_kernel_patch.benchmarking.telling import MIB
from hf_kernel_patch.benchmarking.variants import EAGER
from hf_kernel_patch.cli import pictures
from hf_kernel_patch.cli.demo.picture import FORMATS
from hf_kernel_patch.cli.pictures import FONT, LIGHT, Axes, Bar

#: Height of a bar, in inches.
BAR = 0.26


def draw(output: Path, found: Benchmark) -> None:
    """Write the picture, in the format that the file's ending says."""
    works = found.workloads
    heights = [max(2.0, BAR * (2 + len(_shown(found, work)))) for work in works]
    figure = pictures.figure(LIGHT, 14, 0.5 + sum(heights), found.title)
    panels = figure.subplots(
        len(works), 3, squeeze=False, height_ratios=heights, width_ratios=(1.2, 0.8, 1)
    )
    for work, (speeds, memory, gains) in zip(works, panels, strict=True):
        rows = _shown(found, work)
        pictures.bars(
            speeds,
            LIGHT,
            [("", [_speed(row, found.speed_up(work, row.variant)) for row in rows])],
            f"{work}: tokens a second (line: middle half)",
        )
        peaks = [
            Bar(row.variant, row.peak / MIB, f"{row.peak / MIB:,.0f}") for row in rows if row.peak
        ]
        pictures.bars(memory, LIGHT, [("", peaks)], f"peak MiB ({found.memory})")
        _gains(gains, found, work)
    figure.savefig(output, format=FORMATS[output.suffix.lower()], dpi=120)


def _shown(found: Benchmark, workload: str) -> list[Measured]:
    rows = [row for row in found.rows if row.workload == workload and not row.same_as]
    # Those of single ops, whose names have a space, stay as the table has them: after eager.
    order = pictures.in_order(row.variant for row in rows if " " not in row.variant)
    return sorted(rows, key=lambda row: 0.5 if " " in row.variant else order.index(row.variant))


def _speed(row: Measured, speed_up: Spread | None) -> Bar:
    if row.speed is None:
        return Bar(row.variant, 0, row.failed)
    label = f"{row.speed.median:,.0f}"
    if row.variant != EAGER and speed_up is not None:
        label += f"  {speed_up.median:.2f}x"
    return Bar(row.variant, row.speed.median, label, (row.speed.low, row.speed.high))


def _gains(axes: Axes, found: Benchmark, workload: str) -> None:
    """Two bars an op: alone, and beside the others; a line where the true value is."""
    height, ticks = 0.0, []
    ends = [0.0]
    for op in found.ops_in(workload):
        kinds = (
            (f"{op}, alone", LIGHT.also_ours, found.gain_alone(workload, op)),
            (f"{op}, beside the others", LIGHT.ours, found.loss_without(workload, op)),
        )
        for name, colour, gain in kinds:
            if gain is not None:
                ends += _bar(axes, gain.time, height, colour)
                ticks.append((height, name))
                height += 1
        height += 0.5
    pictures.dress(axes, LIGHT, "ms gained (faint: may be noise)")
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set(ylim=(max(height - 0.9, 3.0), -0.7))
    room = (max(ends) - min(ends)) * 0.35 or 1
    axes.set_xlim(min(ends) - room * (min(ends) < 0), max(ends) + room)
    axes.axvline(0, color=LIGHT.faint, linewidth=0.8)
    if not ticks:
        axes.text(0.02, 0.5, "no op was measured alone", transform=axes.transAxes, fontsize=FONT)


def _bar(axes: Axes, found: Difference, height: float, colour: str) -> list[float]:
    """One bar; where it and its line end."""
    value = found.median * 1e3
    axes.barh(height, value, height=0.72, color=colour, alpha=1 if found.beyond_noise else 0.35)
    ends = [value]
    if found.low is not None and found.high is not None:
        ends += [found.low * 1e3, found.high * 1e3]
        axes.plot(ends[1:], [height, height], color=LIGHT.text, linewidth=1.2)
    label = axes.annotate(
        f"{value:+.2f}",
        (max(0.0, *ends), height),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=LIGHT.text,
        fontsize=FONT,
    )
    label.set_in_layout(False)
    return ends
