"""What was considered and what became of it: rows, as text, as a rich table and as JSON."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from hf_kernel_patch.kernels import broken_entry_points
from hf_kernel_patch.recognition.outcome import REPLAYED, SERVED, CallOutcome, How
from hf_kernel_patch.version import newer_than_tested, versions


class Outcome(StrEnum):
    """What became of a site."""

    PATCHED = "patched"  #: in force
    PENDING = "pending"  #: will be, when the module is imported
    SKIPPED = "skipped"  #: not, for the reason given
    #: In force on the class, but some instances own a forward and bypass it.
    SHADOWED = "shadowed"

    __repr__ = str.__repr__  # lists of outcomes print as lists of words


@dataclass
class Row:
    """One site and its outcome; ``calls`` has what became of its calls while they are counted."""

    architecture: str
    site: str
    op: str
    kernel: str
    outcome: Outcome
    reason: str = ""
    scope: str = "global"
    instances: int | None = None
    calls: Counter[CallOutcome] = field(default_factory=Counter)
    #: The leaf or rule by which the code is known.
    code: str = ""
    #: The first twelve digits of the SHA-256 of the original's source.
    original: str = ""
    _diff: Callable[[], str] = field(default=lambda: "", repr=False, compare=False)
    _measured: Callable[[], str] = field(default=lambda: "", repr=False, compare=False)

    @property
    def served(self) -> int:
        """Calls that the kernel served, while they were counted."""
        return self.calls[SERVED] + self.calls[REPLAYED]

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reason -> calls that the original ran, while they were counted."""
        return {call.reason: n for call, n in self.calls.items() if call.how is How.FALLBACK}

    @property
    def graphs(self) -> dict[str, int]:
        """Calls that CUDA graphs served, and those that they did not, by the reason."""
        kinds = (How.REPLAYED, How.NOT_REPLAYED)
        return {str(call): n for call, n in self.calls.items() if call.how in kinds}

    @property
    def handed_back(self) -> dict[str, int]:
        """The old name of ``fallbacks``."""
        warnings.warn("handed_back is old: use fallbacks", DeprecationWarning, stacklevel=2)
        return self.fallbacks

    @property
    def diff(self) -> str:
        """The unified diff from the original's source to the rewritten one, as it is now.

        "" where a whole function is replaced, or nothing is in force.
        """
        return self._diff()

    @property
    def measured(self) -> str:
        """What ``include="measured"`` has found of the op so far, and where that comes from."""
        return self._measured() if self.outcome in (Outcome.PATCHED, Outcome.SHADOWED) else ""

    def __getstate__(self) -> dict[str, Any]:
        # A copy, in another process perhaps, shows the diff and what was measured of now.
        now = {"_diff": partial(str, self.diff), "_measured": partial(str, self.measured)}
        return {**vars(self), **now}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "architecture": self.architecture,
            "site": self.site,
            "code": self.code,
            "original": self.original,
            "diff": self.diff,
            "op": self.op,
            "kernel": self.kernel,
            "outcome": self.outcome,
            "reason": self.reason,
            "scope": self.scope,
            "instances": self.instances,
            "measured": self.measured,
            "served": self.served,
            "fallbacks": self.fallbacks,
            "graphs": self.graphs,
        }


class PatchReport:
    """The rows of one patch or of several, alive: a pending row turns when its module comes."""

    def __init__(self, rows: Iterable[Row] = (), note: str = ""):
        self.rows = rows if isinstance(rows, list) else list(rows)
        #: Why nothing was considered, where nothing was.
        self.note = note

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def with_outcome(self, *outcomes: Outcome) -> list[Row]:
        """The rows that ended in one of the outcomes."""
        return [row for row in self.rows if row.outcome in outcomes]

    @property
    def patched(self) -> list[Row]:
        """The rows that are in force."""
        return self.with_outcome(Outcome.PATCHED, Outcome.SHADOWED)

    @property
    def skipped(self) -> list[Row]:
        """The rows that are not, each with its reason."""
        return self.with_outcome(Outcome.SKIPPED)

    @property
    def pending(self) -> list[Row]:
        """The rows whose module is not imported yet."""
        return self.with_outcome(Outcome.PENDING)

    def summary(self) -> str:
        """One line."""
        if not self.rows:
            return f"nothing patched{': ' + self.note if self.note else ''}"
        counts = Counter(row.outcome for row in self.rows)
        rows = [row for row in self.rows if row.kernel and row.outcome != Outcome.SKIPPED]
        kernels = ", ".join(dict.fromkeys(row.kernel for row in rows))
        counted = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        return f"{counted}; kernels: {kernels or 'none'}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "summary": self.summary(),
            "note": self.note,
            "versions": versions(),
            "newer": newer_than_tested(),
            "broken_entry_points": dict(broken_entry_points),
            "rows": [row.as_dict() for row in self.rows],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """All of it as JSON."""
        return json.dumps(self.as_dict(), indent=indent)

    def __str__(self) -> str:
        lines = [self.summary()]
        waiting: dict[str, list[str]] = {}
        for row in self.rows:
            if row.outcome == Outcome.PENDING:
                waiting.setdefault(row.architecture, []).append(row.op)
                continue
            lines.append(f"  {row.outcome:9}{row.site} -> {row.kernel}{_details(row)}")
        for architecture, ops in waiting.items():
            lines.append(
                f"  {Outcome.PENDING:9}{architecture}, when it is imported: {', '.join(ops)}"
            )
        lines += [f"  {one} gives no kernel: {why}" for one, why in broken_entry_points.items()]
        if note := newer_than_tested():
            lines.append(f"  {note}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<PatchReport: {self.summary()}>"

    def __rich__(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self.summary()), title_justify="left")
        for name in ("outcome", "site", "kernel", "details"):
            table.add_column(name, overflow="fold")
        colours = {
            Outcome.PATCHED: "green",
            Outcome.PENDING: "cyan",
            Outcome.SKIPPED: "yellow",
            Outcome.SHADOWED: "yellow",
        }
        for row in self.rows:
            site = row.site.removeprefix("transformers.models.")
            colour = colours.get(row.outcome, "")
            outcome = f"[{colour}]{row.outcome}[/]" if colour else row.outcome
            details = escape(_details(row).removeprefix(": "))
            table.add_row(outcome, escape(site), escape(row.kernel), details)
        return table


def _details(row: Row) -> str:
    parts = [row.reason] if row.reason else []
    if measured := row.measured:
        parts.append(measured)
    if row.instances is not None:
        parts.append(f"{row.instances} modules of one model")
    if row.calls:
        parts.append(f"{row.served} calls served")
        parts += [f"{count} fallbacks ({why})" for why, count in row.fallbacks.items()]
    return f": {'; '.join(parts)}" if parts else ""
