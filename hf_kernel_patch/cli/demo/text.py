"""Real text to learn, as bytes, and the batches of it."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path
from typing import Any

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documentation(enough: int = 400_000) -> bytes:
    """The documentation strings of this Python's standard library, at least ``enough`` bytes.

    Raises FileNotFoundError where its sources are not installed.
    """
    found: list[bytes] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, _DOCUMENTED) and (string := ast.get_docstring(node)):
                found.append(string.encode() + b"\n\n")
        if sum(map(len, found)) >= enough:
            break
    if not found:
        raise FileNotFoundError("the standard library has no sources here: give a text by --text")
    return b"".join(found)


def batches(text: bytes, steps: int, size: int, length: int, seed: int) -> Any:
    """(steps, size, length) int64 token ids, one a byte, cut from the text at random places.

    Raises ValueError for a text shorter than ``length``.
    """
    import torch

    if len(text) < length:
        raise ValueError(f"the text has {len(text)} bytes; it needs {length} or more")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - length + 1, (steps, size, 1), generator=generator)
    return data[starts + torch.arange(length)]
