"""How the commands print: tables drawn by rich in a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hf_kernel_patch.patching.report import Outcome, PatchReport, Row


def print_json(value: object) -> None:
    """Plain data as JSON."""
    print(json.dumps(value, indent=2))


def print_report(report: PatchReport) -> None:
    """A report, as its table or its text."""
    console = _console()
    if console.is_terminal:
        console.print(report)
    else:
        print(report)


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells under the names of their columns."""
    console = _console()
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(names, *rows)]
        for row in (names, *rows):
            print("  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def print_diff(found: tuple[Row, str]) -> None:
    """One site, and its diff if it has one; coloured in a terminal."""
    row, diff = found
    if diff:
        what = f"{row.code} -> {row.kernel}"
    elif row.outcome == Outcome.PATCHED:
        what = f"{row.code} -> {row.kernel}, in place of the whole function"
    else:
        what = f"{row.outcome}: {row.reason}"
    console = _console()
    if not console.is_terminal:
        print(f"{row.site}: {what}\n{diff}")
        return
    from rich.syntax import Syntax

    console.print(f"[bold]{row.site}[/]: {what}", highlight=False)
    if diff:
        console.print(Syntax(diff, "diff", background_color="default"))


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function that is told (done, all), and draws a bar on stderr once there is work."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def _console() -> Any:
    from rich.console import Console

    return Console()
