"""How the commands print: tables drawn by rich in a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from hf_kernel_patch.patching.report import Outcome, PatchReport, Row

#: What a last column has to have, in characters, not to be broken too often.
NARROWEST = 24


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


def print_lines(*lines: str) -> None:
    """Sentences, broken between words in a terminal."""
    console = _console() if terminal_width() else None
    for line in lines:
        if console is not None:
            console.print(line, markup=False, highlight=False)
        else:
            print(line)


def print_table(
    names: Sequence[str], rows: Sequence[Sequence[str]], group: int | None = None
) -> None:
    """Rows of cells under the names of their columns.

    In a terminal the last column alone is broken into lines. Where the others leave no room for
    it, the column ``group`` becomes a heading of the rows that share it.
    """
    width = terminal_width()
    if width and group is not None and _needs(names, rows) > width:
        names, rows = _grouped(names, rows, group)
    if not width or _needs(names, rows) > width:
        widths = _widths(names, rows)
        for row in (names, *rows):
            print("  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in names[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(names[-1], overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    _console().print(table)


def terminal_width() -> int:
    """The columns of the terminal that is printed to, or 0 where it is none."""
    console = _console()
    return int(console.width) if console.is_terminal else 0


def _widths(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(names, *rows)]


def _needs(names: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """The width at which no column is broken but the last, and that not too often."""
    *fixed, last = _widths(names, rows)
    return sum(fixed) + 2 * len(fixed) + min(last, NARROWEST)


def _grouped(
    names: Sequence[str], rows: Sequence[Sequence[str]], column: int
) -> tuple[list[str], list[list[str]]]:
    """The table without a column, whose cells are headings between the rows."""
    found: list[list[str]] = []
    for heading in dict.fromkeys(row[column] for row in rows):
        found.append([heading, *("" for _ in names[2:])])
        for row in rows:
            if row[column] == heading:
                first, *others = (*row[:column], *row[column + 1 :])
                found.append([f"  {first}", *others])
    return [*names[:column], *names[column + 1 :]], found


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


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Shows on stderr, if that is a terminal, that something takes its time."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(title) if console.is_terminal else nullcontext():
        yield


def _console() -> Any:
    from rich.console import Console

    return Console()
