"""A small model trained on real text twice, as it is and patched, and the two compared."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import devices, registry, settings
from hf_kernel_patch.cli.demo import models, worker
from hf_kernel_patch.cli.demo.text import documentation
from hf_kernel_patch.cli.demo.worker import BATCH, LENGTH, Plan
from hf_kernel_patch.cli.printing import print_report, print_table
from hf_kernel_patch.errors import KernelPatchError, KernelUnavailableError, unknown
from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching.lookup import exists_here
from hf_kernel_patch.recognition import known

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


@dataclass
class Run:
    """What came of one run: a loss and seconds a step, and what ``worker.training`` ends with."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


STEPS, SECONDS = 100, 75
EAGER, PATCHED = "as it is", "patched"
#: device -> the dtype to train in.
DTYPES = {"cpu": "float32", "cuda": "bfloat16", "npu": "bfloat16"}


def compare(
    model: str,
    text: Path | None,
    steps: int | None,
    device: str | None,
    output: Path,
    seed: int,
) -> None:
    """Run the demo, print what it found and write the picture of the losses to ``output``.

    Without ``steps`` there are STEPS of them, or fewer where those take more than SECONDS.

    Raises:
        ValueError: an unknown model or device, or a text that is too short.
        OSError: a file cannot be read or written.
        KernelPatchError: the device or matplotlib is missing, a run failed, nothing was patched,
            or an original is not back in its place.
    """
    device = device or _default_device()
    _check(model, device, output)
    include, kernels = choose(model, device)
    data = text.read_bytes() if text else documentation()
    if len(data) < LENGTH:
        raise ValueError(f"the text has {len(data)} bytes; the demo needs {LENGTH} or more")
    with tempfile.TemporaryDirectory() as directory, _workers() as pipes:
        parameters = models.save(model, seed, directory)
        seconds = math.inf if steps else SECONDS
        plan = Plan(model, directory, data, steps or STEPS, seed, device, DTYPES[device], None)
        title = f"{model}, {parameters / 1e6:.1f} M parameters, {plan.dtype} on {device}"
        source = text or "documentation strings of the standard library"
        print(f"model: {title}")
        print(f"text: {source}, {len(data):,} bytes; {plan.steps} steps of {BATCH} x {LENGTH}")
        print(f"kernels: {kernels}")
        runs = _train(pipes, {EAGER: plan, PATCHED: replace(plan, include=include)}, seconds)
    report, originals = runs[PATCHED].facts["report"], runs[PATCHED].facts["originals"]
    if not report.patched:
        raise KernelPatchError(f"nothing was patched: {report}")
    print_report(report)
    _print_comparison(device, runs)
    draw(output, title, {name: run.losses for name, run in runs.items()})
    print(f"picture of the loss curves: {output}")
    if lost := [site for site, same in originals.items() if not same]:
        raise KernelPatchError(f"not restored: {', '.join(lost)}")
    print(
        f"unpatched: {len(report.patched)} places had been replaced; all {len(originals)} of the "
        "table hold the very objects that they held before"
    )


def choose(model: str, device: str) -> tuple[str | tuple[str, ...], str]:
    """What to include for a model on a device, and the words for it.

    The kernels that "auto" takes there, else all in plain PyTorch that the model has places for.
    """
    specs = [spec for spec in architectures()[model].sites if exists_here(spec)]
    ops = {known()[spec.code].op for spec in specs}
    usable = [
        kernel
        for kernel in registry.kernels().values()
        if kernel.op in ops
        and kernel.device in ("any", device)
        and registry.unavailable(kernel) is None
    ]
    auto = tuple(kernel.kernel_id for kernel in usable if device in kernel.default_on)
    if auto and device == devices.current():
        return "auto", f'{", ".join(auto)} ("auto" on this device)'
    if auto:
        return auto, f"{', '.join(auto)} (the defaults on {device})"
    plain = tuple(kernel.kernel_id for kernel in usable if kernel.backend == "torch")
    return plain, f'{", ".join(plain)} (all in PyTorch, as "auto" takes none on {device})'


def draw(output: Path, title: str, losses: dict[str, list[float]]) -> None:
    """Write a PNG of the loss curves, one line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, label=name, linewidth=2)
    axes.set(title=title, xlabel="step", ylabel="loss (nats a byte)")
    axes.legend()
    figure.savefig(output, format="png", dpi=120)


def _check(model: str, device: str, output: Path) -> None:
    """Raise, as ``compare`` says, for what can be known before the training."""
    if model not in models.MODELS:
        raise unknown("demo model", model, models.MODELS)
    if device not in DTYPES:
        raise unknown("device", device, DTYPES)
    if settings.disabled():
        raise KernelPatchError("HF_KERNEL_PATCH_DISABLE is set")
    if why := devices.why_not(device):
        raise KernelUnavailableError(why)
    if devices.missing_package("matplotlib"):
        raise KernelPatchError("the picture needs matplotlib: pip install 'hf_kernel_patch[bench]'")
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise FileNotFoundError(f"cannot write the picture to {output}")


def _default_device() -> str:
    current = devices.current()
    return current if current in DTYPES else "cpu"


@contextmanager
def _workers() -> Iterator[dict[str, Connection]]:
    """Two fresh processes that wait for a plan, by the names of the runs."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for name in (EAGER, PATCHED):
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=worker.main, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
        yield pipes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _train(pipes: dict[str, Connection], plans: dict[str, Plan], seconds: float) -> dict[str, Run]:
    """The runs, which take turns step by step until all steps are done or the time is over."""
    from rich.console import Console
    from rich.progress import Progress

    for name, pipe in pipes.items():
        pipe.send(plans[name])
    runs = {name: Run() for name in pipes}
    for name in pipes:
        _answer(pipes, name)
    steps, end = plans[EAGER].steps, time.monotonic() + seconds
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            # Each goes first every other time, so that neither gains by its place.
            for name in list(pipes)[:: 1 if step % 2 else -1]:
                loss, duration = _next(pipes, name)
                runs[name].losses.append(loss)
                runs[name].seconds.append(duration)
            shown = ", ".join(f"{name} {run.losses[-1]:.2f}" for name, run in runs.items())
            progress.update(task, advance=1, description=f"loss {shown}")
            if step and time.monotonic() > end:
                print(f"stopped after {step + 1} steps: {seconds} seconds were over")
                break
    for name, run in runs.items():
        run.facts = _next(pipes, name, end=True)
    return runs


def _next(pipes: dict[str, Connection], name: str, end: bool = False) -> Any:
    """Let a run go on, or come to its end, and wait for what comes of it."""
    pipes[name].send(end)
    return _answer(pipes, name)


def _answer(pipes: dict[str, Connection], name: str) -> Any:
    try:
        answer = pipes[name].recv()
    except (EOFError, OSError):
        raise KernelPatchError(f"the run {name!r} ended unexpectedly") from None
    if isinstance(answer, str):
        raise KernelPatchError(f"the run {name!r} failed:\n{answer}")
    return answer


def _print_comparison(device: str, runs: dict[str, Run]) -> None:
    """The runs side by side, and how far their loss curves lie apart."""
    untimed = min(5, len(runs[EAGER].losses) // 2)
    kind = "resident memory added" if device == "cpu" else "allocated memory"
    print_table(
        ("run", "first loss", "last five", "tokens/s", f"peak of {kind}"),
        [
            (
                name,
                f"{run.losses[0]:.3f}",
                f"{statistics.mean(run.losses[-5:]):.3f}",
                f"{BATCH * LENGTH / statistics.median(run.seconds[untimed:]):,.0f}",
                f"{run.facts['memory'] / 2**20:,.0f} MiB",
            )
            for name, run in runs.items()
        ],
    )
    print(f"tokens/s: of the median step; the runs took turns, the first {untimed} are not timed")
    apart = max(abs(a - b) for a, b in zip(runs[EAGER].losses, runs[PATCHED].losses))
    print(f"largest difference between the loss curves: {apart:.1e}")
