"""Choices that were made before: a small file for each, in the cache's folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_kernel_patch import settings
from hf_kernel_patch.errors import cut
from hf_kernel_patch.measuring import choice
from hf_kernel_patch.measuring.choice import Choice

#: Changes where a file's content, or what follows from times, does.
FORMAT = 1


def file_of(key: Mapping[str, Any]) -> Path:
    """The file for what a choice depends on."""
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    return (
        settings.cache_folder() / f"measured-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    )


def load(key: Mapping[str, Any]) -> tuple[Choice | None, str]:
    """What was chosen before, if it was, or why its file cannot be read."""
    try:
        file = file_of(key)
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, RuntimeError):  # no file, or no folder, which ``store`` tells
        return None, ""
    except (OSError, ValueError) as error:
        return None, _unread(file, error)
    try:
        found = json.loads(text)
        if found["key"] != dict(key):
            return None, ""  # of another key with the same hash
        return choice.read(found["choice"], f"from {file}"), ""
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return None, _unread(file, error)


def store(key: Mapping[str, Any], made: Choice) -> str:
    """Write a choice wholly or not at all; returns why it was not, or "".

    Of a distributed job the first process alone writes.
    """
    if not settings.is_rank_zero():
        return ""
    try:
        file = file_of(key)
    except RuntimeError as error:
        return f"there is no folder for it ({cut(str(error))})"
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"key": dict(key), "choice": made.as_dict()}, indent=1)
        part.write_text(content, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        return f"{cut(str(file))} cannot be written ({cut(str(error.strerror or error))})"
    return ""


def _unread(file: Path, error: Exception) -> str:
    said = cut(str(getattr(error, "strerror", None) or error))
    return f"{cut(str(file))} cannot be read ({type(error).__name__}: {said}): it is measured anew"
