"""The command line in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import hf_kernel_patch
from hf_kernel_patch.cli.commands import app

ROOT = Path(hf_kernel_patch.__file__).parent.parent


def invoke(*arguments: Any) -> Any:
    """The result of a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
