"""One shape of one op: every provider checked against float64, then timed in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.measure.environment import synchronize
from benchmarks.measure.timing import Task, measure, reason
from benchmarks.workloads import ours, peers
from benchmarks.workloads.inputs import Inputs, as_tuple, make_inputs, truth
from benchmarks.workloads.ops import FORWARDS, OPS, Arguments, Op
from benchmarks.workloads.peers import Builder
from benchmarks.workloads.shapes import Case

Row = dict[str, Any]


def providers(case: Case, device: str, compiled: bool) -> tuple[dict[str, Builder], dict[str, str]]:
    """Builders of all that can compute a case here, and why the others cannot."""
    found: dict[str, Builder] = {}
    absent: dict[str, str] = {}
    for name, builder in peers.PEERS[case.op].items():
        if why := peers.absent(case.op, name, device):
            absent[name] = why
        else:
            found[name] = builder
    if compiled:
        original = peers.PEERS[case.op][peers.COMPILED.get(case.op, "eager")]

        def build(a: Arguments) -> peers.Built:
            function, arguments = original(a)
            return torch.compile(function, dynamic=False), arguments

        found["compile"] = build
    own, missing = ours.kernels(case.op, device)
    return found | own, absent | missing


def run(
    case: Case,
    builders: dict[str, Builder],
    device: str,
    dtype: torch.dtype,
    limits: dict[str, Any],
    seconds: float = 0.3,
) -> list[Row]:
    """A row for every phase and provider of a case; a provider that fails has rows that say so."""
    rows = _run(case, builders, device, dtype, limits, seconds)
    if "compile" in builders:
        torch.compiler.reset()  # or it would stop compiling after a few shapes
    collect(device)
    return rows


def _run(
    case: Case,
    builders: dict[str, Builder],
    device: str,
    dtype: torch.dtype,
    limits: dict[str, Any],
    seconds: float,
) -> list[Row]:
    op = OPS[case.op]
    found: list[Row] = []
    phases = case.phases or op.phases
    inputs = make_inputs(op, case, device, dtype)
    expected = truth(op, inputs, backward=any(phase not in FORWARDS for phase in phases))
    calls: dict[str, Callable[[], Any]] = {}
    for phase in phases:
        rows = {name: _row(op, case, phase, name, inputs, dtype) for name in builders}
        for name, builder in builders.items():
            with _caught(rows[name]):
                if name not in calls:
                    function, arguments = builder(inputs.arguments)
                    calls[name] = partial(function, *arguments)
                rows[name] |= _check(op, phase, calls[name], inputs, expected, device)
        tasks = {
            name: _task(phase, calls[name], inputs) for name in builders if not rows[name]["error"]
        }
        for name, times in measure(tasks, device, seconds).items():
            rows[name] |= _timed(times, rows[name], limits)
        found += rows.values()
    return found


def _row(op: Op, case: Case, phase: str, name: str, inputs: Inputs, dtype: torch.dtype) -> Row:
    work = op.work(case.sizes, inputs.arguments, phase)
    return {
        "op": case.op,
        "case": case.label,
        "phase": phase,
        "provider": name,
        "bytes": work.elements * dtype.itemsize,
        "operations": work.operations,
        "error": None,
    }


@contextmanager
def _caught(row: Row) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # one provider must not take the run down
        row["error"] = reason(error)
        gc.collect()


def _task(phase: str, call: Callable[[], Any], inputs: Inputs) -> Task:
    """What to time of a phase. A backward has a forward of its own before each."""

    def gradients(outputs: Any) -> Any:
        return torch.autograd.grad(as_tuple(outputs), inputs.differentiable, inputs.gradients)

    def inference(_: Any) -> Any:
        with torch.no_grad():
            return call()

    def prepare(turn: int) -> Any:
        inputs.restore(turn, gradients=phase not in FORWARDS)
        return call() if phase == "backward" else None

    steps: dict[str, Callable[[Any], Any]] = {
        "forward": lambda _: call(),
        "inference": inference,
        "backward": gradients,
        "step": lambda _: gradients(call()),
    }
    return Task(prepare, steps[phase])


def _check(
    op: Op,
    phase: str,
    call: Callable[[], Any],
    inputs: Inputs,
    expected: dict[str, torch.Tensor],
    device: str,
) -> Row:
    """First call, memory, what is written over, and the errors against float64."""
    inputs.restore(0)
    begin = time.perf_counter()
    found = _once(op, phase, call, inputs)
    synchronize(device)
    first = time.perf_counter() - begin
    written = [
        name
        for name, value in zip(
            [n for n, v in vars(inputs.arguments).items() if torch.is_tensor(v)],
            inputs.values[0],
            strict=True,
        )
        if not torch.equal(getattr(inputs.arguments, name), value)
    ]
    shown = {
        "forward": op.outputs,
        "inference": op.outputs,
        "backward": [f"d {name}" for name in op.differentiable],
        "step": list(expected),
    }[phase]
    errors = {name: _error(found[name], expected[name]) for name in shown}
    del found
    return {
        "first_call_s": first,
        "memory_mib": _memory(
            _task("step" if phase == "backward" else phase, call, inputs), device
        ),
        "overwrites": written,
        "errors": errors,
    }


def _once(op: Op, phase: str, call: Callable[[], Any], inputs: Inputs) -> dict[str, torch.Tensor]:
    """Outputs and, where the phase has them, gradients."""
    with torch.set_grad_enabled(phase != "inference"):
        outputs = as_tuple(call())
    # Cloned, as the backward may write over what it has seen.
    found = {name: out.detach().clone() for name, out in zip(op.outputs, outputs, strict=True)}
    if phase not in FORWARDS:
        gradients = torch.autograd.grad(outputs, inputs.differentiable, inputs.gradients)
        found |= dict(zip((f"d {name}" for name in op.differentiable), gradients, strict=True))
    return found


def _memory(task: Task, device: str) -> float | None:
    """MiB of device memory at the peak of a call, over what its inputs take; None on a CPU."""
    if device == "cpu":
        return None
    backend = getattr(torch, device)
    state = task.prepare(0)
    backend.reset_peak_memory_stats()
    before = backend.memory_allocated()
    task.step(state)
    return float(backend.max_memory_allocated() - before) / 2**20


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300))


def _timed(times: list[float] | str, row: Row, limits: dict[str, Any]) -> Row:
    """The median and what it is of the limits, or the error."""
    if isinstance(times, str):
        return {"error": times}
    middle = median(times)
    moving = row["bytes"] / (limits["copy_gbs"] * 1e9)
    counting = row["operations"] / (limits["matmul_tflops"] * 1e12)
    return {
        "median_s": middle,
        "fastest_s": min(times),
        "rounds": len(times),
        "gbs": row["bytes"] / middle / 1e9,
        "tflops": row["operations"] / middle / 1e12,
        "bound": "operations" if counting > moving else "bytes",
        "share": max(moving, counting) / middle,
    }


def collect(device: str) -> None:
    """Free what nothing refers to."""
    gc.collect()
    if device != "cpu":
        getattr(torch, device).empty_cache()
