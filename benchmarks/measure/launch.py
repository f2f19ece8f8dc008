"""Host time of one call at one token without gradients: what decoding pays for a launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

import hf_kernel_patch
from benchmarks.measure.cases import Row
from benchmarks.measure.timing import host_times, reason
from benchmarks.workloads import ours
from benchmarks.workloads.inputs import make_inputs
from benchmarks.workloads.ops import OPS
from benchmarks.workloads.peers import PEERS, Builder
from benchmarks.workloads.shapes import Case

#: Ops whose original is reached through a class or function that a patch replaces, and whose.
PATCHED = {"rms_norm": "llama", "rope": "llama", "moe": "qwen3_moe"}


def run(
    case: Case, builders: dict[str, Builder], device: str, dtype: torch.dtype, batches: int = 15
) -> list[Row]:
    """A row a provider; and one for the patched original, by each of our kernels, beside it."""
    op = OPS[case.op]
    arguments = make_inputs(op, case, device, dtype, sets=1).arguments
    own, _ = ours.kernels(case.op, device)
    wanted = dict(builders)
    contexts: dict[str, Callable[[], Any]] = {}
    if model := PATCHED.get(case.op):
        for kernel_id in own:
            if kernel_id in builders:
                name = f"{kernel_id} patched"
                wanted[name] = PEERS[case.op]["eager"]
                contexts[name] = partial(hf_kernel_patch.patched, kernel_id, models=model)
    found: dict[str, list[float] | str] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, builder in wanted.items():
        try:
            function, given = builder(arguments)
            calls[name] = partial(function, *given)
        except Exception as error:
            found[name] = reason(error)
    found |= host_times(calls, contexts, device, batches)
    if "compile" in builders:
        torch.compiler.reset()
    return [_row(case, name, found[name]) for name in wanted]


def _row(case: Case, name: str, times: list[float] | str) -> Row:
    row: Row = {"op": case.op, "case": case.label, "phase": "launch", "provider": name}
    if isinstance(times, str):
        return row | {"error": times}
    timed = {"median_s": median(times), "fastest_s": min(times), "rounds": len(times)}
    return row | timed | {"error": None}
