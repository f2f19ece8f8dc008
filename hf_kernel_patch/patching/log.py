"""The lines about patches: in the program's log, and on stderr where a user asks for them."""

from __future__ import annotations

import logging
import sys

from hf_kernel_patch import settings

logger = logging.getLogger("hf_kernel_patch")


def tell(message: str, *values: object) -> None:
    """Log a line, in the first process of a distributed job alone."""
    if settings.is_rank_zero():
        logger.info(message, *values)


def show(level: int = logging.INFO) -> None:
    """Show the lines from now on, also where the program sets up no logging."""
    logger.setLevel(level)
    if not any(isinstance(handler, _ToStderr) for handler in logger.handlers):
        logger.addHandler(_ToStderr())


class _ToStderr(logging.Handler):
    """Writes to the stderr of the moment, unless a handler of the program gets the line too."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("hf_kernel_patch: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        others = [one for one in logger.handlers if one is not self]
        if others or (logger.propagate and logging.getLogger().handlers):
            return
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)
