"""Running a program patched: its directory on PYTHONPATH has every Python below it patch itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from hf_kernel_patch import settings

DIRECTORY = str(Path(__file__).resolve().parent)


def execute(arguments: list[str], options: Mapping[str, str]) -> NoReturn:
    """Go on as this Python with ``arguments``, patched; its children are patched as well.

    ``options`` are values for the variables: HF_KERNEL_PATCH for "include", and
    HF_KERNEL_PATCH_MODELS for "models" and so on.
    """
    command = [sys.executable, *arguments]
    environment = settings.child_environment(DIRECTORY, options)
    sys.stdout.flush()
    sys.stderr.flush()
    if sys.platform == "win32":  # execve there returns to the shell at once
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)
    os.execve(command[0], command, environment)
