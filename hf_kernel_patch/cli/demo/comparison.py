"""What came of the two runs: speeds with their spread, memory, losses, decoded text."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from hf_kernel_patch.benchmarking.noise import Spread, spread
from hf_kernel_patch.patching.report import PatchReport

EAGER, PATCHED = "as it is", "patched"
MIB = 2**20


@dataclass
class Measured:
    """What came of one run, step by step and at the end."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    #: Bytes at the peak of the training.
    memory: int = 0
    #: Bytes that head and loss of a real vocabulary take; None where that cannot be measured.
    loss_memory: float | None = None
    #: What was decoded, and how long one token took, time after time.
    text: bytes = b""
    token_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Both runs, which took turns step by step, and what they trained."""

    runs: dict[str, Measured]
    report: PatchReport
    tokens_a_step: int
    #: Tokens whose head and loss were measured alone.
    loss_tokens: int

    @property
    def steps(self) -> int:
        """Steps of each run."""
        return len(self.runs[EAGER].losses)

    @property
    def untimed(self) -> int:
        """The first steps, which compile kernels and fill caches."""
        return min(5, self.steps // 2)

    def speed(self, name: str) -> Spread:
        """Tokens a second of a run."""
        return spread([self.tokens_a_step / one for one in self._timed(name)])

    def speed_up(self) -> Spread:
        """Time of the run as it is over that of the patched one, turn by turn."""
        pairs = zip(self._timed(EAGER), self._timed(PATCHED), strict=True)
        return spread([eager / patched for eager, patched in pairs])

    def decoding_speed_up(self) -> float:
        """Time of a decoded token as it is, over that of the patched run."""
        eager, patched = (self.runs[name].token_seconds for name in (EAGER, PATCHED))
        return statistics.median(eager) / statistics.median(patched)

    def apart(self) -> float:
        """The largest difference between the losses of a step."""
        eager, patched = (self.runs[name].losses for name in (EAGER, PATCHED))
        return max(abs(a - b) for a, b in zip(eager, patched, strict=True))

    def _timed(self, name: str) -> list[float]:
        return self.runs[name].seconds[self.untimed :]


def same_beginning(one: bytes, other: bytes) -> int:
    """How many bytes at the beginning are the same."""
    differs = (place for place, (a, b) in enumerate(zip(one, other)) if a != b)
    return next(differs, min(len(one), len(other)))
