"""Results as files: one JSON a run, written while it goes on, and read back together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: What tells a row from the others of a result.
KEYS = (
    *("op", "case", "phase", "provider"),
    *("model", "variant", "layers", "batch", "length", "prompt", "step", "loss_of"),
)


def write(result: dict[str, Any], folder: Path, name: str) -> Path:
    """Write a result as ``folder/name.json``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(result, indent=1) + "\n")
    fresh.replace(path)
    return path


def read(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The results in the folders and below, oldest first.

    Raises FileNotFoundError where a folder has none.
    """
    found = []
    for folder in folders:
        paths = [folder] if folder.is_file() else sorted(folder.rglob("*.json"))
        if not paths:
            raise FileNotFoundError(f"no results in {folder}")
        found += [json.loads(path.read_text()) for path in paths]
    return sorted((one for one in found if "kind" in one), key=lambda one: one["date"])


def merge(found: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """By device and subject: the rows, later ones in place of earlier, and the runs they are of."""
    sections: dict[tuple[str, str], dict[str, Any]] = {}
    for result in found:
        run = {key: value for key, value in result.items() if key != "rows"}
        for row in result["rows"]:
            place = result["device"]["name"], subject(result, row)
            section = sections.setdefault(place, {"rows": {}, "kind": result["kind"]})
            section["rows"][tuple(row.get(key) for key in KEYS)] = row | {"run": run}
    return sections


def subject(result: dict[str, Any], row: dict[str, Any]) -> str:
    """What a section of the results is about."""
    kind = result["kind"]
    named = row["op"] if kind == "ops" else f"{kind} {row['model']}" if "model" in row else kind
    return ", ".join(filter(None, (named, result["dtype"])))
