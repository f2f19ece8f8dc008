"""What was found the last time that all families were run, in served.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.families.run import Result

PATH = Path(__file__).with_name("served.json")
#: Of this version of transformers.
TRANSFORMERS = "5.24.0"

#: family -> class -> {"inputs": kind, "served": {op: calls}, "fallbacks": {op: [reason]}, ...}
Record = dict[str, dict[str, dict[str, Any]]]


def load() -> Record:
    """The checked-in record."""
    found: Record = json.loads(PATH.read_text(encoding="utf-8"))
    return found


def add(record: Record, result: Result) -> None:
    """Write one result into the record."""
    reasons: dict[str, list[str]] = {}
    for op, reason in sorted(result.fallbacks):
        reasons.setdefault(op, []).append(reason)
    record.setdefault(result.family, {})[result.name] = {
        "inputs": result.inputs,
        "served": dict(sorted(result.served.items())),
        "fallbacks": reasons,
        "without": result.without,
    }


def save(record: Record) -> None:
    """Write the record, one class a line."""
    lines = []
    for family in sorted(record):
        classes = [
            f"    {json.dumps(name)}: {json.dumps(found)}"
            for name, found in sorted(record[family].items())
        ]
        lines.append(f"  {json.dumps(family)}: {{\n" + ",\n".join(classes) + "\n  }")
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
