"""The runs of a verification: each site by itself, and the whole model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.errors import KernelPatchWarning, cut
from hf_kernel_patch.patching.bisection import Trial, trying
from hf_kernel_patch.patching.block import patched
from hf_kernel_patch.patching.report import Outcome, Row
from hf_kernel_patch.recognition.outcome import How
from hf_kernel_patch.verifying.comparing import Measure, compared, epsilon_of
from hf_kernel_patch.verifying.finding import (
    groups,
    layer_number,
    layers_of,
    modules_of_sites,
    own_parameters,
)
from hf_kernel_patch.verifying.measuring import Result, Trials, calls
from hf_kernel_patch.verifying.verification import Checked, Verdict
from hf_kernel_patch.verifying.whole import Whole, room_for, whole_measures, why_no_double

if TYPE_CHECKING:
    from torch import nn

#: What came of a patched run, and its calls by their outcome; and that by site and module.
_Found = tuple[Result | Exception, Counter[Any]]
_Ours = dict[tuple[str, str], _Found]


class Run:
    """One verification, whose model is in the state in which it is compared."""

    def __init__(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        arguments: dict[str, Any],
        factor: float,
        seed: int,
        tell: Callable[[str], object],
    ):
        self._model, self._arguments = model, arguments
        self._factor, self._seed, self._tell = factor, seed, tell
        self._whole = Whole(model, batch, seed)
        self._told = False

    def rows(self, layers_at_once: int) -> list[Checked]:
        """What is found about each site by itself."""
        with self._patched() as found:
            rows = [row for row in found if row.outcome in (Outcome.PATCHED, Outcome.SHADOWED)]
        self._kernels = {
            site: tuple(dict.fromkeys(row.kernel for row in rows if row.site == site))
            for site in dict.fromkeys(row.site for row in rows)
        }
        self._modules = modules_of_sites(self._model, rows)
        every = {path: one for held in self._modules.values() for path, one in held.items()}
        checked: dict[tuple[str, str], Checked] = {}
        parts = list(groups(every, layers_of(self._model), layers_at_once))
        for number, paths in enumerate(parts):
            self._tell(f"sites, part {number + 1} of {len(parts)}: {len(paths)} modules")
            checked |= self._part({path: every[path] for path in paths})
        return [checked[site, path] for site, modules in self._modules.items() for path in modules]

    def whole(self) -> tuple[list[Measure], str]:
        """The measures of the whole model, and why there are none, if so."""
        device, why = room_for(self._model)
        if why:
            return [], why
        self._tell("the whole model")
        eager = _attempt(self._whole.run)
        if isinstance(eager, Exception):
            return [], f"the original fails by itself: {_named(eager)}"
        try:
            with self._patched():
                ours = self._whole.run()
        except Exception as error:
            return [Measure("the patched model", False, float("inf"), 0.0, 0.0)], (
                f"patched, it fails: {_named(error)}"
            )
        self._tell("the whole model in float64")
        try:
            truth = self._whole.truth(device)
            measures = whole_measures(ours, eager, truth, self._model, self._factor)
        except Exception as error:
            return [], f"it cannot be run in float64: {_named(error)}"
        return measures, ""

    def _part(self, modules: dict[str, nn.Module]) -> dict[tuple[str, str], Checked]:
        """The rows of some modules, by site and path."""
        called = calls(modules, self._whole.forward)
        trials = {path: Trials(modules[path], call, self._seed) for path, call in called.items()}
        eager: dict[str, Result | Exception] = {}
        for path, trial in trials.items():
            eager[path] = _attempt(trial.run)
        ours: _Ours = {}
        for site, held in self._modules.items():
            paths = [path for path in held if isinstance(eager.get(path), Result)]
            if paths:
                ours |= self._ours(site, {path: trials[path] for path in paths})
        rows: dict[tuple[str, str], Checked] = {}
        for path, module in modules.items():
            chosen = [site for site, held in self._modules.items() if path in held]
            found = {site: ours[site, path] for site in chosen if (site, path) in ours}
            wanted = any(map(_is_served, found.values()))
            wide = self._truth(trials[path], module) if wanted else "not wanted"
            for site in chosen:
                verdict, reason, measures = self._judged(
                    eager.get(path), found.get(site), wide, module
                )
                rows[site, path] = Checked(
                    site=site,
                    module=path,
                    layer=layer_number(path),
                    kernels=self._kernels[site],
                    verdict=verdict,
                    reason=reason,
                    measures=tuple(measures),
                )
        return rows

    def _ours(self, site: str, trials: dict[str, Trials]) -> _Ours:
        """The patched runs of a site's modules, where it alone is patched."""
        found: _Ours = {}
        with trying(Trial(only=frozenset({site}))), self._patched() as rows:
            for path, trial in trials.items():
                before = _counts(rows, site)
                result = _attempt(trial.run)
                found[site, path] = result, _counts(rows, site) - before
        return found

    @staticmethod
    def _truth(trial: Trials, module: nn.Module) -> Result | str:
        """The run in float64, or why there is none."""
        if why := why_no_double(own_parameters(module)):
            return why
        found = _attempt(trial.truth)
        return found if isinstance(found, Result) else f"no float64 run: {_named(found)}"

    def _judged(
        self,
        eager: Result | Exception | None,
        found: _Found | None,
        truth: Result | str,
        module: nn.Module,
    ) -> tuple[Verdict, str, list[Measure]]:
        if eager is None:
            return Verdict.NOT_CHECKED, "the model does not call it on this batch", []
        if isinstance(eager, Exception) or found is None:
            return Verdict.NOT_CHECKED, f"the original fails by itself: {_named(eager)}", []
        ours, counted = found
        if isinstance(ours, Exception):
            return Verdict.WORSE, f"it fails: {_named(ours)}", []
        if not _is_served(found):
            reasons = dict.fromkeys(str(one.reason) for one in counted if one.reason)
            return Verdict.NOT_SERVED, "; ".join(reasons) or "its fused code was not reached", []
        if isinstance(truth, str):
            return Verdict.NOT_CHECKED, truth, []
        held = [*own_parameters(module), *eager.outputs.values()]
        try:
            measures = compared(ours, eager, truth, epsilon_of(held), self._factor)
        except ArithmeticError as error:
            return Verdict.NOT_CHECKED, str(error), []
        bad = any(one.worse for one in measures)
        return (Verdict.WORSE if bad else Verdict.RIGHT), "", measures

    @contextmanager
    def _patched(self) -> Iterator[list[Row]]:
        """Everything that the arguments choose, as far as a trial allows it."""
        with warnings.catch_warnings():
            if self._told:  # what is skipped is told once
                warnings.simplefilter("ignore", KernelPatchWarning)
            self._told = True
            with patched(**self._arguments) as report:
                yield report.rows


def _attempt(run: Callable[[], Result]) -> Result | Exception:
    try:
        return run()
    except Exception as error:
        return error.with_traceback(None)  # which would hold all tensors of the run


def _is_served(found: _Found) -> bool:
    ours, counted = found
    served = any(one.how in (How.SERVED, How.REPLAYED) for one in counted)
    return served and isinstance(ours, Result)


def _counts(rows: list[Row], site: str) -> Counter[Any]:
    """The calls of a site so far, by their outcome."""
    found: Counter[Any] = Counter()
    for row in rows:
        if row.site == site:
            found.update(row.calls)
    return found


def _named(error: object) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {cut(str(error).partition(chr(10))[0], 300)}"
