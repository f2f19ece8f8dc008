"""The command line. Each group of commands is a file; help shows them in the order of imports."""

from __future__ import annotations

from hf_kernel_patch.cli.commands import (  # noqa: F401 - they add their commands
    looking,
    measuring,
    running,
    verifying,
)
from hf_kernel_patch.cli.commands.app import app

__all__ = ["app", "main"]


def main() -> None:
    """The entry point."""
    app()
