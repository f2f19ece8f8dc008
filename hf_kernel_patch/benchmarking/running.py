"""One benchmark from its first call to its last round."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.api import count_calls, require_unpatched
from hf_kernel_patch.benchmarking import workloads
from hf_kernel_patch.benchmarking.choosing import (
    Choice,
    check,
    check_model,
    devices_of,
    title_of,
)
from hf_kernel_patch.benchmarking.keeping import kept
from hf_kernel_patch.benchmarking.measuring import (
    OUT_OF_MEMORY,
    Clock,
    Sample,
    Samples,
    Told,
    Turn,
    in_turns,
    quick_collection,
    seen_again,
)
from hf_kernel_patch.benchmarking.result import Benchmark, Measured
from hf_kernel_patch.benchmarking.variants import EAGER, PATCHED, Variant, plan
from hf_kernel_patch.benchmarking.workloads import DECODING, TRAINING, Workload
from hf_kernel_patch.errors import KernelPatchError, KernelPatchWarning, cut
from hf_kernel_patch.patching.block import patched
from hf_kernel_patch.patching.choosing import choose, why_nothing
from hf_kernel_patch.patching.report import PatchReport
from hf_kernel_patch.recognition import site as sites
from hf_kernel_patch.version import versions
from hf_kernel_patch.workload import as_batch, batch_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Calls:
    """What became of the calls of one call of the model.

    Attributes:
        served: op -> how many its kernel served.
        fallbacks: reason -> how many the original ran.
        summary: what was patched.
    """

    served: Mapping[str, int]
    fallbacks: Mapping[str, int]
    summary: str


class Run:
    """One benchmark. What is wrong is raised when it is made; ``result`` measures.

    Args:
        model: that is measured.
        batch: what its forward takes, or None for random tokens.
        choice: what is measured.
        told: is told how far things are.
    """

    def __init__(
        self, model: nn.Module, batch: Mapping[str, Any] | None, choice: Choice, told: Told
    ):
        check(choice)
        wanted, kernels = choose(**choice.arguments)
        check_model(model)
        require_unpatched()
        if not kernels:
            raise KernelPatchError(f"nothing to measure: {why_nothing(wanted.why_nothing)}")
        self._model, self._choice, self._told = model, choice, told
        self._set_aside = False
        self._batch = batch_of(model, seed=choice.seed) if batch is None else as_batch(batch, model)
        self._variants = plan(
            choice.arguments, wanted.exclude, kernels, choice.ops, choice.compiled
        )
        self._devices = devices_of(model)
        self._clock = Clock(self._devices, choice.now)
        self._workloads: dict[str, Workload] = {}
        self._unmeasured: dict[str, str] = {}
        self._samples = Samples()
        #: (variant, workload) -> the calls of its first call.
        self._calls: dict[tuple[str, str], Calls] = {}
        #: Variant -> workload -> the variant whose turns are its own.
        self._same: dict[str, dict[str, str]] = {}
        self._compiled: Any = None
        self._warned = False

    def result(self) -> Benchmark:
        """All rounds."""
        with (
            kept(self._model),
            self._compiling(),
            quick_collection() as self._set_aside,
            warnings.catch_warnings(),
        ):
            self._find_workloads()
            self._settle()
            turns = self._turns()
            in_turns(turns, self._choice.rounds, self._choice.seed, self._told, self._samples)
        return self.so_far()

    def so_far(self) -> Benchmark:
        """What is known of the rounds that are whole."""
        names = [*(one.name for one in self._variants), *self._choice.others]
        known = {*self._samples.found, *self._samples.failed}
        whole = {work: self._calls.get((PATCHED, work)) for work in self._workloads}
        return Benchmark(
            title=title_of(self._model, self._batch, self._devices),
            rows=tuple(
                self._row(name, work)
                for work in self._workloads
                for name in names
                if (self._alias(name, work) or name, work) in known
            ),
            ops=self._ops(),
            rounds=self._samples.rounds,
            served={work: dict(one.served) for work, one in whole.items() if one},
            fallbacks={work: dict(one.fallbacks) for work, one in whole.items() if one},
            unmeasured=dict(self._unmeasured),
            versions=versions(),
            memory="added" if self._devices == ("cpu",) else "allocated",
        )

    def _find_workloads(self) -> None:
        """Those that run as they are, each tried once."""
        model, batch, choice = self._model, self._batch, self._choice
        made: dict[str, Callable[[], Workload]] = {}
        if choice.train:
            made[TRAINING] = lambda: workloads.training(model, batch, choice.seed)
        if choice.decode:
            made[DECODING] = lambda: workloads.decoding(model, batch, choice.decode, choice.seed)
        for name, make in made.items():
            self._told.begin(f"trying {name}")
            workload = make()
            reason = workloads.WHY_NOT[name](model, batch) or self._clock.settle(workload, model)
            if reason and reason != OUT_OF_MEMORY:
                self._unmeasured[name] = reason
                continue
            self._workloads[name] = workload
            if reason:  # patched it may fit
                self._samples.failed[EAGER, name] = reason
            if choice.compiled and name == DECODING:
                self._unmeasured["compile, decoding"] = (
                    "generate() calls the model itself, not what torch.compile makes of it"
                )
        if not self._workloads:
            reasons = "; ".join(f"{name}: {why}" for name, why in self._unmeasured.items())
            raise KernelPatchError(f"nothing of this model can be measured. {reasons}")

    def _settle(self) -> None:
        """A first call of everything, in which kernels are compiled and calls are counted."""
        others = [one for one in self._variants if one.name != EAGER]
        self._told.begin("warming up", len(others))
        for number, variant in enumerate(others):
            self._told.step(number, variant.name)
            for name, workload in self._of(variant).items():
                with self._entered(variant) as (called, report):
                    with _counting():
                        reason = self._clock.once(workload, called)
                    self._calls[variant.name, name] = _calls_of(report)
                if reason:
                    self._samples.failed[variant.name, name] = reason
        if not self._ops() and not any(name == PATCHED for name, _ in self._samples.failed):
            summary = next(one.summary for key, one in self._calls.items() if key[0] == PATCHED)
            name = cut(type(self._model).__qualname__)
            raise KernelPatchError(
                f"nothing to compare: no kernel serves a call of {name} here ({cut(summary)})"
            )

    def _turns(self) -> dict[str, tuple[Turn, Sequence[str]]]:
        """Every variant with the workloads in which it is one of its own."""
        found: dict[str, tuple[Turn, Sequence[str]]] = {}
        for variant in self._variants:
            same = {name: self._same_as(variant, name) for name in self._of(variant)}
            self._same[variant.name] = {name: other for name, other in same.items() if other}
            names = [name for name, other in same.items() if not other]
            found[variant.name] = (partial(self._turn, variant), names)
        for name, turn in self._choice.others.items():
            found[name] = (turn, [*self._workloads])
        return found

    def _same_as(self, variant: Variant, workload: str) -> str:
        """An earlier variant in which the same kernels serve the same calls, or ""."""
        if not variant.op or (variant.name, workload) in self._samples.failed:
            return ""
        own = self._served(variant.name, workload)
        for one in self._variants[: self._variants.index(variant)]:
            failed = one.compiled or (one.name, workload) in self._samples.failed
            if not failed and self._served(one.name, workload) == own:
                return one.name
        return ""

    def _turn(self, variant: Variant, names: Sequence[str]) -> dict[str, Sample | str]:
        with self._entered(variant) as (called, _):
            return {name: self._clock.turn(self._workloads[name], called) for name in names}

    @contextmanager
    def _entered(self, variant: Variant) -> Iterator[tuple[Any, PatchReport]]:
        """What is called in place of the model, and the report; patched meanwhile."""
        if variant.arguments is None:
            yield self._compiled_model() if variant.compiled else self._model, PatchReport()
            return
        with ExitStack() as stack:
            with seen_again(self._set_aside):
                report = stack.enter_context(patched(**variant.arguments))
            if not self._warned:  # what is skipped is told once
                warnings.simplefilter("ignore", KernelPatchWarning)
                self._warned = True
            yield self._model, report

    def _of(self, variant: Variant) -> dict[str, Workload]:
        """The workloads of a variant."""
        if not variant.compiled:
            return self._workloads
        return {name: one for name, one in self._workloads.items() if name == TRAINING}

    def _compiled_model(self) -> Any:
        import torch

        if self._compiled is None:
            self._compiled = torch.compile(self._model)
        return self._compiled

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Nothing that was compiled here is left."""
        try:
            yield
        finally:
            if self._compiled is not None:
                import torch

                self._compiled = None
                torch.compiler.reset()

    def _served(self, variant: str, workload: str) -> Mapping[str, int]:
        """Op -> calls that its kernel served in one call of the model."""
        found = self._calls.get((variant, workload))
        return found.served if found else {}

    def _ops(self) -> tuple[str, ...]:
        """The ops that serve calls, in the whole or alone."""
        return tuple(dict.fromkeys(op for one in self._calls.values() for op in one.served))

    def _alias(self, variant: str, workload: str) -> str:
        return self._same.get(variant, {}).get(workload, "")

    def _row(self, variant: str, workload: str) -> Measured:
        same_as = self._alias(variant, workload)
        samples = self._samples.found.get((same_as or variant, workload), [])
        peaks = [one.peak for one in samples if one.peak is not None]
        return Measured(
            workload,
            variant,
            self._workloads[workload].tokens,
            tuple(one.seconds for one in samples),
            tuple(peaks) if len(peaks) == len(samples) else (),
            self._samples.failed.get((same_as or variant, workload), ""),
            same_as,
        )


def _calls_of(report: PatchReport) -> Calls:
    served: Counter[str] = Counter()
    fallbacks: Counter[str] = Counter()
    for row in report:
        served[row.op] += row.served
        fallbacks.update(row.fallbacks)
    return Calls({op: n for op, n in served.items() if n}, fallbacks, report.summary())


@contextmanager
def _counting() -> Iterator[None]:
    before = sites.counting
    count_calls(True)
    try:
        yield
    finally:
        count_calls(before)
