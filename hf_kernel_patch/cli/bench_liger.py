"""Liger in turns with all others: in a process of its own, as it patches one for good."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import devices, settings
from hf_kernel_patch.benchmarking import workloads
from hf_kernel_patch.benchmarking.choosing import Choice, devices_of
from hf_kernel_patch.benchmarking.measuring import Clock, Sample, Turn, why
from hf_kernel_patch.cli.demo.workers import ended
from hf_kernel_patch.errors import KernelPatchError, cut

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from hf_kernel_patch.cli.bench import Model

PACKAGE = "liger_kernel"


def check(model_type: str) -> None:
    """KernelPatchError where Liger is not installed, or does not know the model type."""
    if reason := devices.why_not_importable(PACKAGE):
        raise KernelPatchError(f"--liger: {PACKAGE} {cut(reason)}")
    if _apply(model_type) is None:
        raise KernelPatchError(f"--liger: {PACKAGE} has nothing for {cut(model_type)}")


@contextmanager
def started(model: Model, model_type: str, batch: dict[str, Any], choice: Choice) -> Iterator[Turn]:
    """The turns of a model that is built in a process which Liger has patched before."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    on_cpu = {name: getattr(one, "cpu", lambda one=one: one)() for name, one in batch.items()}
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    try:
        with settings.variables_unset():
            process.start()
        theirs.close()
        pipe.send((model, model_type, on_cpu, choice.decode, choice.seed))

        def turn(names: Sequence[str]) -> dict[str, Sample | str]:
            try:
                pipe.send([*names])
                found: dict[str, Sample | str] = pipe.recv()
            except (EOFError, OSError):
                return dict.fromkeys(names, "its process ended unexpectedly")
            return found

        yield turn
    finally:
        ended(process)
        pipe.close()


def serve(pipe: Connection) -> None:
    """What the process runs: it builds the model, then measures the workloads it is asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is the one that an interrupt ends
    try:
        model, model_type, batch, decode, seed = pipe.recv()
        turn: Turn | None = None
        while True:
            names = pipe.recv()
            try:
                turn = turn or _prepared(model, model_type, batch, decode, seed)
                pipe.send(turn(names))
            except Exception as error:
                pipe.send(dict.fromkeys(names, why(error)))
    except (EOFError, OSError):  # the parent has gone
        pass


def _prepared(model: Model, model_type: str, batch: Any, decode: int, seed: int) -> Turn:
    """The turns, after a first call of each workload, which is not counted."""
    from hf_kernel_patch.cli.bench import build
    from hf_kernel_patch.workload import as_batch

    apply = _apply(model_type)
    if apply is None:
        raise ValueError(f"{PACKAGE} has nothing for {cut(model_type)}")
    apply()
    built, _ = build(model)
    given = as_batch(batch, built)
    made = {
        workloads.TRAINING: workloads.training(built, given, seed),
        workloads.DECODING: workloads.decoding(built, given, decode, seed),
    }
    clock = Clock(devices_of(built))

    def turn(names: Sequence[str]) -> dict[str, Sample | str]:
        for name in names:
            if name not in clock.calls and (reason := clock.settle(made[name], built)):
                return {name: reason, **(turn([one for one in names if one != name]))}
        return {name: clock.turn(made[name], built) for name in names}

    return turn


def _apply(model_type: str) -> Any:
    """What patches this process, or None."""
    module = importlib.import_module(f"{PACKAGE}.transformers.monkey_patch")
    return getattr(module, f"apply_liger_kernel_to_{model_type}", None)
