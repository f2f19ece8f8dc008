"""Which ops serve the next step, and what follows from how long the steps took."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field

from hf_kernel_patch.measuring.comparing import Comparison, Sample, compared, ratios

#: Steps with everything that "auto" takes, before anything is timed.
WARM_UP = 3
#: Comparisons that each question takes, and how many times as many steps there may be at most.
ROUNDS, PATIENCE = 8, 3
#: An op pays, or does not, where the whole interval is beyond one by so much.
MARGIN = 0.01
#: An op without which the first so many steps took less than this share of the time is out at once.
AT_ONCE, SHARE = 3, 0.7

Ops = frozenset[str]
_Plan = Generator[Ops, Sample, "Verdict"]
NOT_COMPARED = "too few steps could be compared, so it is as auto has it"
NOTHING_CALLED = "no kernel served a call in the first steps, so it is as auto has it"


@dataclass(frozen=True)
class Verdict:
    """What a schedule has found.

    Attributes:
        ops: those that stay in.
        findings: op -> the time with it divided by that without it.
        whole: the time with all of ``ops`` divided by that without any.
        note: why it is not what the comparisons say, if so.
    """

    ops: Ops
    findings: dict[str, Comparison] = field(default_factory=dict)
    whole: Comparison | None = None
    note: str = ""


class Schedule:
    """Fed with the time of each step, it says what serves the next one.

    Args:
        ops: what "auto" takes.
        extras: ops that "auto" leaves out here, which are taken if they pay.
        together: whether the number of steps must not depend on their times, as where several
            processes step together.
    """

    def __init__(self, ops: Iterable[str], extras: Iterable[str] = (), together: bool = False):
        self._base, self._extras = frozenset(ops), tuple(extras)
        self._together = together
        self._served: set[str] = set()
        self._findings: dict[str, Comparison] = {}
        #: Steps so far, and those that there may be, which is known after the first ones.
        self.steps, self.limit = 0, PATIENCE * usual(len(self._base), len(self._extras))
        self.verdict: Verdict | None = None
        #: Whether it is to be told which ops serve calls.
        self.warming_up = True
        self._plan = self._run()
        #: The ops that serve the step which is running.
        self.ops = next(self._plan)

    def served(self, op: str) -> None:
        """An op has served a call."""
        self._served.add(op)

    def step(self, seconds: float | None, size: int) -> None:
        """A step has ended. Without ``seconds`` it was not comparable, and comes once more."""
        if self.verdict is not None:
            return
        self.steps += 1
        if self.steps >= self.limit:
            self._plan.close()
            self.verdict = Verdict(self._base, self._findings, note=NOT_COMPARED)
            return
        if seconds is None or seconds <= 0 or size <= 0:
            if not self._together:
                return
            seconds, size = 0.0, 0  # which compares with nothing
        try:
            self.ops = self._plan.send(Sample(self.steps, seconds, size))
        except StopIteration as ended:
            self.verdict = ended.value

    def _run(self) -> _Plan:
        yield self._base.union(self._extras)
        for _ in range(WARM_UP - 1):
            yield self._base
        self.warming_up = False
        asked = sorted(self._base & self._served)
        extras = [op for op in self._extras if op in self._served]
        if not asked and not extras:
            return Verdict(self._base, note=NOTHING_CALLED)
        steps = usual(len(asked), len(extras))
        self.limit = PATIENCE * steps
        auto = self._base
        while (slow := (yield from self._ask(asked))) is not None:
            self._base -= {slow}
            asked.remove(slow)
            auto = self._base  # which is not tried again
        self._base -= {op for op in asked if self._is_slow(op)}
        # Asked last, since some take the place of others, and pay where those are slow alone.
        yield from self._ask(extras)
        chosen = self._base.union(op for op in extras if self._is_fast(op))
        self._base = auto
        verdict = yield from self._confirm(chosen)
        while self._together and self.steps < steps:
            yield verdict.ops
        return verdict

    def _is_slow(self, op: str) -> bool:
        found = self._findings.get(op)
        return found is not None and found.low > 1 + MARGIN

    def _is_fast(self, op: str) -> bool:
        found = self._findings.get(op)
        return found is not None and found.high < 1 - MARGIN

    def _ask(self, asked: list[str]) -> Generator[Ops, Sample, str | None]:
        """Compare each op in and out; returns one that is to go at once, and to ask anew then."""
        if not asked:
            return None
        kinds = [self._base, *(self._base ^ {op} for op in asked)]
        samples: dict[Ops, list[Sample]] = {}
        for _ in self._rounds(samples, kinds):
            yield from self._round(samples, kinds)
            for op in asked:
                with_it = ratios_of(samples, self._base ^ {op}, self._base)
                if op in self._base:
                    with_it = [1 / ratio for ratio in with_it]
                if (found := compared(with_it)) is not None:
                    self._findings[op] = found
                first = with_it[:AT_ONCE] if op in self._base and not self._together else []
                if len(with_it) == AT_ONCE and first and min(first) > 1 / SHARE:
                    self._findings[op] = Comparison(
                        sorted(first)[AT_ONCE // 2], min(first), max(first), AT_ONCE
                    )
                    return op
        return None

    def _confirm(self, chosen: Ops) -> _Plan:
        """Compare what was chosen with everything out, and with what "auto" takes."""
        nothing: Ops = frozenset()
        if not chosen:
            return Verdict(chosen, self._findings)
        kinds = [nothing, chosen] + [self._base] * (chosen != self._base and bool(self._base))
        samples: dict[Ops, list[Sample]] = {}
        for _ in self._rounds(samples, kinds):
            yield from self._round(samples, kinds)
        whole = compared(ratios_of(samples, chosen, nothing))
        if whole is not None and whole.low > 1:
            return Verdict(
                nothing, self._findings, whole, "together the kernels are slower than none"
            )
        if whole is None:
            return Verdict(self._base, self._findings, note=NOT_COMPARED)
        if len(kinds) > 2:
            more = compared(ratios_of(samples, chosen, self._base))
            auto = compared(ratios_of(samples, self._base, nothing))
            if more is not None and more.low > 1 and auto is not None and auto.low <= 1:
                note = "together they are slower than what auto takes"
                return Verdict(self._base, self._findings, auto, note)
        return Verdict(chosen, self._findings, whole)

    def _rounds(self, samples: dict[Ops, list[Sample]], kinds: list[Ops]) -> Iterable[int]:
        """One round more, until every question has its comparisons."""
        for number in range(PATIENCE * ROUNDS):
            fewest = min(len(ratios_of(samples, kind, kinds[0])) for kind in kinds[1:])
            if fewest >= ROUNDS or (self._together and number >= ROUNDS):
                return
            yield number

    def _round(
        self, samples: dict[Ops, list[Sample]], kinds: list[Ops]
    ) -> Generator[Ops, Sample, None]:
        """Each kind once, beginning with another each time; the first time no step counts."""
        if not samples:
            for kind in kinds:
                samples[kind] = []
                yield kind
        turn = len(samples[kinds[0]]) % len(kinds)
        for kind in [*kinds[turn:], *kinds[:turn]]:
            samples[kind].append((yield kind))


def ratios_of(samples: dict[Ops, list[Sample]], kind: Ops, reference: Ops) -> list[float]:
    """The times of one kind of step in relation to those of another, in their order."""
    return ratios(samples.get(kind, []), samples.get(reference, []))


def usual(ops: int, extras: int = 0) -> int:
    """How many steps it takes for so many ops, where all can be compared."""
    kinds = 3 + sum(1 + number for number in (ops, extras) if number)
    return WARM_UP + (1 + ROUNDS) * kinds
