"""Each case in a process of its own, which imports nothing but that family's modules."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

from tests.families.building import Case
from tests.families.run import Result, run

#: What all models import; the processes are forked from one that has them already.
_COMMON = [
    "numpy",
    "rich.console",
    "torch",
    "torch._dynamo",
    "transformers.generation",
    "transformers.modeling_layers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "wrapt",
]


def pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that end after one case; with a server to fork them where the platform has it."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(_COMMON)
    return ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)


def run_alone(case: Case, route: str = "global") -> Result:
    """``run`` in a process of its own; what it raises comes here."""
    with pool(1) as processes:
        return processes.submit(run, case, route).result()


def run_all(cases: Iterable[Case], jobs: int) -> Iterator[tuple[Case, Result | Exception]]:
    """Every case with its result, or with what it raised, in the order they end."""
    with pool(jobs) as processes:
        started: dict[Future[Result], Case] = {processes.submit(run, case): case for case in cases}
        for future in as_completed(started):
            error = future.exception()
            yield started[future], future.result() if error is None else _told(error)


def _told(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return error
    raise error
