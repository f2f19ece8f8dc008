"""What a builder of a peer is: an op's arguments by name to a function and what to call it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from benchmarks.workloads.ops import Arguments

Built: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]
Builder: TypeAlias = Callable[[Arguments], Built]
