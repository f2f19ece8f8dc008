"""The commands that measure nothing: what is made of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import markdown, results
from benchmarks.report import summary as shown
from benchmarks.workloads import models

Folders = Annotated[list[Path] | None, typer.Argument(help="folders of results")]
OURS = [Path("benchmarks/results")]


def report(
    folders: Folders = None,
    into: Annotated[Path, typer.Option(help="the file to write")] = Path("benchmarks/RESULTS.md"),
) -> None:
    """RESULTS.md and its charts from the results; sections of other devices in it stay."""
    found = results.merge(results.read(folders or OURS))
    for written in markdown.write(found, into):
        typer.echo(written)


def summary(
    folders: Folders = None,
    picture: Annotated[Path, typer.Option(help="README's picture; a dark one is beside it")] = Path(
        "docs/speedup.png"
    ),
    figures: Annotated[Path, typer.Option(help="what `hf-kernel-patch demo` quotes")] = Path(
        "hf_kernel_patch/cli/demo/measured.json"
    ),
) -> None:
    """README's picture and the figures that the demo quotes, from the results."""
    found = results.merge(results.read(folders or OURS))
    shown.write_cells(found, figures)
    for written in (figures, *shown.write_picture(found, picture)):
        typer.echo(written)
    if missing := [name for name in models.names() if name not in shown.pictured(found)]:
        typer.echo(f"not in the picture, as not measured on {shown.GPU}: {', '.join(missing)}")
