"""What ``run --report`` writes when a process ends."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hf_kernel_patch import api, settings
from hf_kernel_patch.errors import cut
from hf_kernel_patch.patching.report import Outcome, PatchReport, Row

#: The rows of the patch that was made at the start: they stay, also if the program ends it.
_rows: list[Row] = []


def begin() -> None:
    """Keep the rows of the patch that the environment has just put in force."""
    global _rows
    if settings.requested_by_environment():
        _rows = api.patch_transformers().rows


def write(name: str) -> None:
    """Write the report of this process, wholly or not at all; a failure is told on stderr."""
    part = Path(f"{name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(_report(), indent=2), encoding="utf-8")
        part.replace(name)
    except OSError as error:
        part.unlink(missing_ok=True)
        print(f"hf-kernel-patch: no report is written: {error}", file=sys.stderr)


def _report() -> dict[str, Any]:
    """As ``status --json``, with the counts of all rows and with what the process was."""
    last = api.status()  # also makes the rows say what is true now
    kept = {id(row) for row in _rows}
    rows = [*_rows, *(row for row in last if id(row) not in kept)]
    rows = [row for row in rows if row.outcome != Outcome.PENDING]
    if "transformers" not in sys.modules:
        note = "the program has not imported transformers"
    else:
        note = last.note or "no model of transformers was imported"
    fallbacks: Counter[str] = Counter()
    for row in rows:
        fallbacks.update(row.fallbacks)
    error = getattr(sys, "last_value", None)
    return {
        **PatchReport(rows, "" if rows else note).as_dict(),
        "counts": {"served": sum(row.served for row in rows), "fallbacks": dict(fallbacks)},
        "program": [cut(argument) for argument in sys.argv],
        "pid": os.getpid(),
        "rank": settings.rank(),
        "error": _named(error) if error is not None else None,
    }


def _named(error: BaseException) -> str:
    name, text = type(error).__name__, cut(str(error))
    return f"{name}: {text}" if text else name
