"""What was chosen for one model in one mode, as data and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_kernel_patch.measuring.comparing import Comparison
from hf_kernel_patch.measuring.schedule import NOT_COMPARED, Ops, Verdict

NOW = "measured now"


@dataclass(frozen=True)
class Choice:
    """A verdict, how many steps it took, and where it comes from.

    ``unkept`` says why no file has it, where that is so.
    """

    verdict: Verdict
    steps: int
    source: str = NOW
    unkept: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``read`` takes it back."""
        verdict = self.verdict
        return {
            "ops": sorted(verdict.ops),
            "findings": {op: one.as_dict() for op, one in verdict.findings.items()},
            "whole": verdict.whole and verdict.whole.as_dict(),
            "note": verdict.note,
            "steps": self.steps,
        }

    def why_out(self, op: str, where: str) -> str:
        """Why the original serves the calls of an op that is left out."""
        said = self.said_of(op)
        return f"measured: {said} ({where})"

    def said_of(self, op: str) -> str:
        """What was found of one op."""
        found = self.verdict.findings.get(op)
        alone = self.verdict.note == NOT_COMPARED and op not in self.verdict.ops
        if alone and found is not None and found.low > 1:  # out before steps were too few
            return compare(found)
        if self.verdict.note:
            return self.verdict.note
        return "it served no call in the first steps" if found is None else compare(found)

    def text(self, op: str, where: str) -> str:
        """What a row of a report says of its op."""
        left = "" if op in self.verdict.ops else "left out, "
        unkept = f", not kept: {self.unkept}" if self.unkept else ""
        return f"measured: {left}{self.said_of(op)} ({where}; {self.source}{unkept})"

    def summary(self) -> str:
        """What became of every op that was asked about, and of all together."""
        verdict = self.verdict
        every = [
            f"{op} {'in' if op in verdict.ops else 'out'} ({compare(found)})"
            for op, found in sorted(verdict.findings.items())
        ]
        if verdict.whole is not None:
            every.append(f"together {compare(verdict.whole)}")
        return "; ".join(every + ([verdict.note] if verdict.note else []))


def read(data: Any, source: str) -> Choice:
    """A Choice from ``Choice.as_dict``; TypeError, KeyError or ValueError for anything else."""
    findings = {op: _comparison(one) for op, one in data["findings"].items()}
    whole = None if data["whole"] is None else _comparison(data["whole"])
    ops: Ops = frozenset(_text(op) for op in data["ops"])
    verdict = Verdict(ops, findings, whole, _text(data["note"]))
    return Choice(verdict, int(data["steps"]), source)


def compare(found: Comparison) -> str:
    """How much faster or slower a step is with something than without it."""
    change = found.ratio - 1
    if found.low <= 1 <= found.high:
        return f"within noise ({change:+.1%} of time with it)"
    return f"{change:.1%} slower with it" if change > 0 else f"{-change:.1%} faster with it"


def _comparison(data: Any) -> Comparison:
    ratio, low, high = (float(data[name]) for name in ("ratio", "low", "high"))
    if not 0 < low <= ratio <= high < 1e9:
        raise ValueError("a comparison is none of positive numbers")
    return Comparison(ratio, low, high, int(data["steps"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} stands where a text belongs")
    return value
