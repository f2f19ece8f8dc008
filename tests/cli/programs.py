"""The command line as a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cli.commands import ROOT


def program(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a program that finds the package in no other way than its own."""
    found = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]
    path = os.pathsep.join([variables.pop("PYTHONPATH", ""), *found]).strip(os.pathsep)
    first = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    main = f"{first}; from hf_kernel_patch.cli.commands import main"
    return subprocess.run(
        [sys.executable, "-c", f"{main}; main()", *arguments],
        env={**os.environ, "PYTHONPATH": path, **variables},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
