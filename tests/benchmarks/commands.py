"""The benchmark commands in this process, and what they have written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app

Result = dict[str, Any]


def command(*arguments: str) -> str:
    """What a command prints; it has to succeed."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def written(folder: Path) -> Result:
    """The one result in a folder."""
    (path,) = folder.rglob("*.json")
    found: Result = json.loads(path.read_text())
    assert found["device"]["type"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"].startswith("python -m benchmarks")
    return found


def report(folder: Path) -> str:
    """RESULTS.md of a folder, made beside it; every chart that it names is there."""
    into = folder / "report" / "RESULTS.md"
    command("report", str(folder), "--into", str(into))
    text = into.read_text()
    charts = re.findall(r'(?:src|srcset)="(.*?)"', text)
    assert all((into.parent / chart).read_bytes()[:4] == b"\x89PNG" for chart in charts)
    assert charts
    light = [chart for chart in charts if not chart.endswith("-dark.png")]
    assert charts == [one for chart in light for one in (f"{chart[:-4]}-dark.png", chart)]
    return text
