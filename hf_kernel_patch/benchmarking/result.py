"""What a benchmark has found: a row for each variant and workload, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_kernel_patch.benchmarking.noise import Difference, Spread, difference, spread
from hf_kernel_patch.benchmarking.variants import EAGER, PATCHED, alone, without


@dataclass(frozen=True)
class Measured:
    """One variant in one workload.

    Attributes:
        workload: "training" or "decoding".
        variant: "eager", "patched", "rope alone", "without rope", "compile" or "liger".
        tokens: of one call.
        seconds: of a call, for each round.
        peaks: bytes at the peak of a call, for each round; () where they cannot be known.
        failed: why there are no times, or "".
        same_as: the variant whose turns these are, where the same kernels serve the same calls in
            both; "" where it had turns of its own.
    """

    workload: str
    variant: str
    tokens: int
    seconds: tuple[float, ...] = ()
    peaks: tuple[int, ...] = ()
    failed: str = ""
    same_as: str = ""

    @property
    def time(self) -> Spread | None:
        """Seconds of a call: the median round, and the quartiles."""
        return spread(self.seconds) if self.seconds else None

    @property
    def speed(self) -> Spread | None:
        """Tokens a second: of the median round, and the quartiles."""
        return spread([self.tokens / one for one in self.seconds]) if self.seconds else None

    @property
    def peak(self) -> int | None:
        """Bytes at the peak, of the median round."""
        return round(spread(self.peaks).median) if self.peaks else None


@dataclass(frozen=True)
class Gain:
    """What one variant takes less than another, in seconds and in bytes, round by round."""

    time: Difference
    memory: Difference | None


@dataclass(frozen=True)
class Benchmark:
    """What ``bench`` has found.

    Attributes:
        title: the model, its size, where it ran and with what batch.
        rows: a row for each variant and workload.
        ops: the ops that serve calls of the model.
        rounds: how many turns each variant had.
        served: workload -> op -> calls that its kernel served in one call, with everything patched.
        fallbacks: workload -> reason -> calls that ran the original, with everything patched.
        unmeasured: workload or variant -> why it was not measured.
        versions: of the installed packages.
        memory: what the bytes are: "allocated" on the device, model and gradients included, or
            "added" to what the process had before.
    """

    title: str
    rows: tuple[Measured, ...]
    ops: tuple[str, ...]
    rounds: int
    served: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fallbacks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    memory: str = "allocated"

    @property
    def workloads(self) -> tuple[str, ...]:
        """Those that were measured."""
        return tuple(dict.fromkeys(row.workload for row in self.rows))

    def row(self, workload: str, variant: str) -> Measured | None:
        """One row, or None where there is none."""
        found = (one for one in self.rows if (one.workload, one.variant) == (workload, variant))
        return next(found, None)

    def gain(self, workload: str, variant: str = PATCHED, over: str = EAGER) -> Gain | None:
        """What a variant takes less than another, or None where one of them has no times."""
        first, other = self.row(workload, over), self.row(workload, variant)
        if first is None or other is None or not first.seconds or not other.seconds:
            return None
        memory = difference(first.peaks, other.peaks) if first.peaks and other.peaks else None
        return Gain(difference(first.seconds, other.seconds), memory)

    def speed_up(self, workload: str, variant: str = PATCHED) -> Spread | None:
        """Eager's time over that of a variant, round by round; None where one has no times."""
        first, other = self.row(workload, EAGER), self.row(workload, variant)
        if first is None or other is None or not first.seconds or not other.seconds:
            return None
        return spread([a / b for a, b in zip(first.seconds, other.seconds, strict=True)])

    def gain_alone(self, workload: str, op: str) -> Gain | None:
        """What an op gains where it is the only one, against eager."""
        return self.gain(workload, alone(op))

    def loss_without(self, workload: str, op: str) -> Gain | None:
        """What an op adds to all others: what is lost where it is left out of the whole."""
        return self.gain(workload, PATCHED, over=without(op))

    def ops_in(self, workload: str) -> tuple[str, ...]:
        """The ops that make a difference in a workload: alone, or to the whole."""
        pairs = {
            op: (self.row(workload, alone(op)), self.row(workload, without(op))) for op in self.ops
        }
        return tuple(
            op
            for op, (one, rest) in pairs.items()
            if (one is not None and one.same_as != EAGER)
            or (rest is not None and rest.same_as != PATCHED)
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: rows with all their rounds, and every difference."""
        gains = {
            workload: {
                "whole": _plain(self.gain(workload)),
                "ops": {
                    op: {
                        "alone": _plain(self.gain_alone(workload, op)),
                        "lost_without": _plain(self.loss_without(workload, op)),
                    }
                    for op in self.ops_in(workload)
                },
            }
            for workload in self.workloads
        }
        return {
            "title": self.title,
            "versions": dict(self.versions),
            "rounds": self.rounds,
            "memory": self.memory,
            "rows": [_row(one) for one in self.rows],
            "gains": gains,
            "served": {name: dict(calls) for name, calls in self.served.items()},
            "fallbacks": {name: dict(calls) for name, calls in self.fallbacks.items()},
            "unmeasured": dict(self.unmeasured),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """All of it as JSON; seconds and bytes."""
        return json.dumps(self.as_dict(), indent=indent)

    def __str__(self) -> str:
        from hf_kernel_patch.benchmarking.telling import text_of

        return text_of(self)


def _plain(gain: Gain | None) -> dict[str, Any] | None:
    if gain is None:
        return None
    return {"seconds": _judged(gain.time), "bytes": gain.memory and _judged(gain.memory)}


def _judged(found: Difference) -> dict[str, Any]:
    return {**asdict(found), "beyond_noise": found.beyond_noise}


def _row(row: Measured) -> dict[str, Any]:
    time, speed = row.time, row.speed
    return {
        **asdict(row),
        "seconds_median": time and time.median,
        "seconds_quartiles": time and [time.low, time.high],
        "tokens_per_s": speed and speed.median,
        "peak_bytes": row.peak,
    }
