"""Finding the sites that change a result: patched runs of ever fewer sites."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from hf_kernel_patch.api import require_unpatched, unpatch
from hf_kernel_patch.errors import KernelPatchError, KernelPatchWarning, shown
from hf_kernel_patch.patching.bisection import Trial, trying
from hf_kernel_patch.patching.block import patched
from hf_kernel_patch.settings import UNSET, Config, Include, Names, Options

#: Whether a run was right, and the sites that were patched in it.
Run = Callable[[Trial], tuple[bool, list[str]]]
#: How many runs there are at most, unless somebody says otherwise.
MOST_RUNS = 100


@dataclass(frozen=True)
class Bisection:
    """What a bisection has found.

    Attributes:
        groups: sets of sites, each of which changes the result by itself; all sites of a set are
            needed for that. () where the result is right with every site patched.
        considered: how many sites were patched at first.
        runs: how many runs it took.
        proven: whether a run with everything patched but these sites was right. Without, the runs
            were not enough.
    """

    groups: tuple[tuple[str, ...], ...]
    considered: int
    runs: int
    proven: bool = True

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites that were found."""
        return tuple(site for group in self.groups for site in group)

    @property
    def exclude(self) -> str:
        """What ``exclude=`` and HF_KERNEL_PATCH_EXCLUDE take to leave these sites out."""
        return ",".join(self.sites)

    def __str__(self) -> str:
        if not self.groups:
            return self._nothing()
        lines: list[str] = []
        for group in self.groups:
            what = "This site changes" if len(group) == 1 else "Only together, these sites change"
            lines += [f"{what} the result:", *(f"  {site}" for site in group)]
        it = "it" if len(self.sites) == 1 else "them"
        lines += [f"Leave {it} to the original by", f'  exclude="{self.exclude}"']
        if self.proven:
            lines.append(f"With it the result was right. ({self.runs} runs)")
        else:
            lines.append(
                f"Not proven: after {self.runs} runs there may be fewer sites, or others as well. "
                "Allow more runs."
            )
        return "\n".join(lines)

    def _nothing(self) -> str:
        if not self.proven:
            return "Nothing is known yet."
        if not self.considered:
            return "Nothing to find: no site was patched."
        return f"Nothing to find: the result is right with all {self.considered} sites patched."


def bisect(
    function: Callable[[], object],
    include: Include = UNSET,
    *,
    exclude: Names | None = UNSET,
    models: Names = UNSET,
    backend: str = UNSET,
    options: Options = UNSET,
    config: Config = None,
    max_runs: int = MOST_RUNS,
    progress: Callable[[str], object] = print,
) -> Bisection:
    """Find the sites whose patch changes a result, by running a function again and again.

    It runs once without a patch, once with everything patched, and then with ever fewer sites,
    until the smallest set is known that changes the result. What is patched is chosen as for
    ``patch_transformers``.

    Args:
        function: returns True where its result is right. It has to give the same at each call. An
            exception counts as wrong, unless it is raised without a patch, too.
        max_runs: how often the function runs at most.
        progress: is called with a line for each run.

    Raises:
        KernelPatchError: the result is wrong without a patch, or something is patched already.
    """
    arguments: dict[str, Any] = {
        "include": include,
        "exclude": exclude,
        "models": models,
        "backend": backend,
        "options": options,
        "config": config,
        "strict": False,
    }
    if not callable(function):
        raise TypeError(f"bisect takes a function, not {shown(function)}")
    patched(**arguments)  # a mistake is told now
    require_unpatched()

    def run(trial: Trial) -> tuple[bool, list[str]]:
        unpatched = trial.only == frozenset()
        with warnings.catch_warnings(), trying(trial):
            if trial != Trial():  # what is skipped is told once
                warnings.simplefilter("ignore", KernelPatchWarning)
            try:
                with nullcontext() if unpatched else patched(**arguments):
                    answer = function()
            except Exception as error:
                if unpatched:
                    raise
                progress(f"{type(error).__name__}: {shown(str(error))}")
                answer = False
            finally:
                unpatch()
        if answer is None:
            raise TypeError("the function has to return whether its result is right, not None")
        return bool(answer), list(trial.patched)

    return Search(run, max_runs, progress).result()


class _Enough(Exception):
    """No more runs are allowed."""


class Search:
    """Runs that get ever smaller, and what is known so far.

    Args:
        run: runs what is looked at, held to a trial.
        most: how often, at most.
        tell: is called with a line for each run.
    """

    def __init__(self, run: Run, most: int, tell: Callable[[str], object]):
        if isinstance(most, bool) or not isinstance(most, int) or most < 2:
            raise ValueError(f"max_runs is a number of at least 2, not {shown(most)}")
        self._run, self._most, self._tell = run, most, tell
        self.runs = 0
        self._considered = 0
        self._groups: list[tuple[str, ...]] = []
        #: Sites that were patched alone -> whether the result was right.
        self._answers: dict[frozenset[str], bool] = {}
        #: The smallest set that is known to change the result, beside the groups.
        self._smallest: tuple[str, ...] = ()

    def result(self) -> Bisection:
        """All runs. KernelPatchError where the result is wrong without a patch."""
        right, _ = self._try(Trial(only=frozenset()), "nothing patched")
        if not right:
            raise KernelPatchError(
                "the result is wrong without any patch: this is not what a kernel has changed"
            )
        right, sites = self._try(Trial(), "everything patched")
        self._considered = len(sites)
        if not right and not sites:
            raise KernelPatchError(
                "the result is wrong although no site is patched: it is not the same at each run, "
                "or a kernel patches the model in its own way"
            )
        try:
            while not right:
                self._smallest = tuple(sites)
                self._groups.append(self._narrowed())
                self._smallest = ()
                found = [site for group in self._groups for site in group]
                label = f"everything but {len(found)} of {self._considered} sites"
                right, sites = self._try(Trial(without=frozenset(found)), label)
                if not right and not sites:
                    return self.so_far()
        except _Enough:
            return self.so_far()
        return Bisection(tuple(self._groups), self._considered, self.runs)

    def so_far(self) -> Bisection:
        """What is known before all runs are done."""
        groups = [*self._groups, *([self._smallest] if self._smallest else [])]
        return Bisection(tuple(groups), self._considered, self.runs, proven=False)

    def _narrowed(self) -> tuple[str, ...]:
        """A set that changes the result, of which no site can be missed.

        Binary search for the shortest beginning of the list that changes it: its last site is
        needed. Then the same among those before it, as long as the sites found are not enough.
        """
        rest, needed = list(self._smallest), list[str]()
        while rest and not (needed and self._changes(needed)):
            passes, changes = 0, len(rest)
            while changes - passes > 1:
                middle = (passes + changes) // 2
                if self._changes([*rest[:middle], *needed]):
                    changes = middle
                else:
                    passes = middle
            needed = [rest[changes - 1], *needed]
            rest = rest[: changes - 1]
        if len(needed) > 1:  # an effect that another site hides is no beginning's
            for site in needed:
                fewer = [one for one in self._smallest if one != site]
                if fewer:
                    self._changes(fewer)
        return self._smallest

    def _changes(self, sites: list[str]) -> bool:
        """Whether these sites alone change the result; then they are the smallest known set."""
        chosen = frozenset(sites)
        if chosen not in self._answers:
            label = f"{len(sites)} of {self._considered} sites patched"
            self._answers[chosen], _ = self._try(Trial(only=chosen), label)
        if not self._answers[chosen]:
            self._smallest = tuple(sites)
        return not self._answers[chosen]

    def _try(self, trial: Trial, label: str) -> tuple[bool, list[str]]:
        if self.runs == self._most:
            raise _Enough
        self.runs += 1
        right, sites = self._run(trial)
        if trial == Trial():
            label += f" ({len(sites)} sites)"
        self._tell(f"run {self.runs}, {label}: {'right' if right else 'wrong'}")
        return right, sites
