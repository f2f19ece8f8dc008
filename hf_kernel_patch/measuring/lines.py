"""Lines for the log, which are told later: where no lock is held, as a handler may do anything."""

from __future__ import annotations

from collections.abc import Callable


class Lines:
    """Kept by ``say``, and given to ``tell`` by ``speak``."""

    def __init__(self, tell: Callable[..., None]):
        self._tell = tell
        self._kept: list[tuple[str, tuple[object, ...]]] = []

    def say(self, message: str, *values: object) -> None:
        """A line, with values for its format."""
        self._kept.append((message, values))

    def speak(self) -> None:
        """Tell what was said."""
        while self._kept:
            try:
                message, values = self._kept.pop(0)
            except IndexError:  # another thread tells it
                return
            self._tell(message, *values)
