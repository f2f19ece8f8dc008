"""``hf-kernel-patch verify``: a model is loaded and compared with the truth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from hf_kernel_patch.cli import pictures
from hf_kernel_patch.cli.demo import picture
from hf_kernel_patch.cli.pictures import LIGHT
from hf_kernel_patch.cli.printing import print_lines, print_table
from hf_kernel_patch.errors import KernelPatchError
from hf_kernel_patch.patching.block import patched
from hf_kernel_patch.verifying import Checked, Verification, verify
from hf_kernel_patch.verifying.comparing import check_factor
from hf_kernel_patch.workload import batch_of, load

#: Panels in a row of the picture.
_WIDE = 3


def verify_model(
    model: str,
    chosen: dict[str, Any],
    *,
    dtype: str | None,
    device: str | None,
    layers: int | None,
    batch: int,
    length: int,
    text: Path | None,
    train: bool,
    factor: float,
    seed: int,
) -> Verification:
    """Load a model, make a batch for it, and verify it; ``chosen`` is what to patch."""
    patched(**chosen)  # a mistake is told before a large model is loaded
    check_factor(factor)
    loaded = load(model, dtype=dtype, device=device, layers=layers, seed=seed, tell=_tell)
    made = batch_of(
        loaded, batch=batch, length=length, text=text, folder=model, seed=seed, tell=_tell
    )
    return verify(loaded, made, train=train, factor=factor, seed=seed, progress=_tell, **chosen)


def tell(found: Verification) -> None:
    """Print what was found."""
    print_lines(found.summary())
    for title, (names, rows) in found.tables().items():
        print_lines("", f"{title}:")
        print_table(names, rows, group=0)
    print_lines(*found.notes())


def draw(output: Path, title: str, found: Verification) -> None:
    """Write a picture of the errors by layer, a panel for each site."""
    sites = {
        site: measured
        for site, rows in found.by_site().items()
        if (measured := [row for row in rows if row.measures])
    }
    if not sites:
        raise KernelPatchError("there is no picture to draw: no site was served and checked")
    high = -(-len(sites) // _WIDE)
    wide = min(_WIDE, len(sites))
    figure = pictures.figure(LIGHT, 4.2 * wide, 0.8 + 2.6 * high, title)
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    last = max((row.layer or 0 for row in found.rows), default=0)
    limits = _decades(one for rows in sites.values() for row in rows for one in _plotted(row))
    handles: dict[str, Any] = {}
    for axes, (site, rows) in zip(panels, sites.items()):
        _panel(axes, rows, last, handles)
        short = site.rpartition(".modeling_")[2].partition(".")[2] or site
        bad = " (WORSE)" if any(row in found.worse for row in rows) else ""
        pictures.dress(axes, LIGHT, f"{short}{bad}", grid="y")
        axes.set(yscale="log", ylim=limits, xlabel="layer", ylabel="error")
    for axes in panels[len(sites) :]:
        axes.set_axis_off()
    pictures.legend(figure, LIGHT, list(handles.values()), list(handles))
    figure.savefig(output, format=picture.FORMATS[output.suffix.lower()], dpi=120)


def _plotted(row: Checked) -> list[float]:
    """The errors of a module that have a point: of its worst output and its worst gradient."""
    chosen = [one for one in (row.output, row.gradient) if one is not None]
    return [error for one in chosen for error in (one.ours, one.eager)]


def _decades(errors: Iterable[float]) -> tuple[float, float]:
    """The powers of ten around the errors, so that all panels have the same axis."""
    held = [math.log10(one) for one in errors if 0 < one < math.inf] or [0.0]
    return 10.0 ** math.floor(min(held)), 10.0 ** math.ceil(max(held) + 1e-9)


def _panel(axes: Any, rows: list[Checked], last: int, handles: dict[str, Any]) -> None:
    """The lines of one site: ours over eager's, of outputs and of gradients.

    What lies in no layer, such as the last norm, stands right of the last one. What is no number
    has no point.
    """
    colours = pictures.colours(("eager", "ours"), LIGHT)
    for kind, style in (("output", "-"), ("gradient", ":")):
        at: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            measure = getattr(row, kind)
            if measure is not None:
                place = last + 1 if row.layer is None else row.layer
                at.setdefault(place, []).append((measure.eager, measure.ours))
        places = sorted(at)
        for index, (name, width) in enumerate((("eager", 3.5), ("ours", 1.4))):
            values = [max(pair[index] for pair in at[place]) for place in places]
            (line,) = axes.plot(
                places,
                values,
                style,
                color=colours[name],
                linewidth=width,
                marker=pictures.marker(name) if name == "ours" else "s",
                markersize=4,
            )
            handles.setdefault(f"{name}, {kind}", line)
    axes.set_xticks(sorted({0, last // 2, last, last + 1}))
    axes.set_xticklabels([*map(str, sorted({0, last // 2, last})), "other"])
    axes.set_xlim(-0.5, last + 1.5)


def _tell(line: str) -> None:
    typer.echo(f"hf-kernel-patch: {line}", err=True)
