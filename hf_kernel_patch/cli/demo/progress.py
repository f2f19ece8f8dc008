"""How far the demo is: a bar in a terminal, elsewhere a line every ten seconds; both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds between two lines where there is no terminal.
EVERY = 10.0


class Lines:
    """A line when a part begins, and one every ``EVERY`` seconds until the next part."""

    def __init__(self) -> None:
        self._title = self._text = self._of = ""
        self._last = self._start = time.monotonic()

    def begin(self, title: str, steps: int | None = None) -> None:
        """A part begins, of so many steps."""
        self._title = self._text = title
        self._of = f" of {steps}" if steps else ""
        self._say()

    def step(self, done: int, text: str = "") -> None:
        """So many steps are done; ``text`` says how things are."""
        self._text = f"{self._title}: {done}{self._of}" + (f", {text}" if text else "")
        self.beat()

    def beat(self) -> None:
        """To be called while time goes by."""
        if time.monotonic() - self._last >= EVERY:
            self._say()

    def _say(self) -> None:
        self._last = time.monotonic()
        print(f"[{self._last - self._start:3.0f} s] {self._text}", file=sys.stderr, flush=True)


class Bar:
    """The same, as a bar that rich redraws by itself."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.drawn = Progress(console=Console(stderr=True), transient=True)
        self._title = ""
        self._task = self.drawn.add_task("", total=None)

    def begin(self, title: str, steps: int | None = None) -> None:
        """A part begins, of so many steps."""
        self._title = title
        self.drawn.reset(self._task, total=steps, description=title)

    def step(self, done: int, text: str = "") -> None:
        """So many steps are done; ``text`` says how things are."""
        words = f"{self._title}, {text}" if text else self._title
        self.drawn.update(self._task, completed=done, description=words)

    def beat(self) -> None:
        """Rich has a thread for this."""


@contextmanager
def on_stderr() -> Iterator[Lines | Bar]:
    """What fits where stderr goes."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    bar = Bar()
    with bar.drawn:
        yield bar
