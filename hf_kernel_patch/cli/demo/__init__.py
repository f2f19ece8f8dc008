"""A small model trained on real text twice, as it is and patched, and the two compared."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hf_kernel_patch import devices, registry, settings
from hf_kernel_patch.cli.demo import models, picture, progress, telling, worker, workers
from hf_kernel_patch.cli.demo.comparison import EAGER, PATCHED, Comparison, Measured
from hf_kernel_patch.cli.demo.progress import Bar, Lines
from hf_kernel_patch.cli.demo.telling import say
from hf_kernel_patch.cli.demo.text import documentation
from hf_kernel_patch.cli.demo.worker import Plan
from hf_kernel_patch.errors import KernelPatchError, KernelUnavailableError, unknown
from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching.block import patched
from hf_kernel_patch.patching.lookup import exists_here
from hf_kernel_patch.patching.report import PatchReport
from hf_kernel_patch.recognition import known

STEPS, SECONDS = 100, 50
#: How often each run decodes, unless that takes longer; the first time is not timed, as it compiles
#: and captures.
DECODINGS, DECODING_SECONDS = 4, 8
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
    """Run the demo, print what it found and write the picture to ``output``.

    Without ``steps`` there are STEPS of them, or fewer where those take more than SECONDS.

    Raises:
        ValueError: an unknown model, device or kind of picture, or a text that is too short.
        OSError: a file cannot be read or written.
        KernelPatchError: the device or matplotlib is missing, a run failed, nothing was patched,
            or an original is not back in its place.
        SystemExit: a signal ended it, with its exit status.
    """
    device = device or _default_device()
    _check(model, device, output)
    include, kernels = choose(model, device)
    data = text.read_bytes() if text else documentation()
    size = models.size_on(device)
    if len(data) < size.length:
        raise ValueError(f"the text has {len(data)} bytes; the demo needs {size.length} or more")
    plan = Plan(model, size, data, steps or STEPS, seed, device, DTYPES[device], None)
    plans = {EAGER: plan, PATCHED: replace(plan, include=include)}
    say(f"text: {text or 'documentation strings of the standard library'}, {len(data):,} bytes")
    say(f"kernels: {kernels}")
    if ignored := [name for name in settings.given_variables() if not name.endswith("_CACHE")]:
        say(f"not used here: {', '.join(ignored)}; the demo chooses for itself")
    with workers.stoppable(), progress.on_stderr() as told:
        told.begin("starting two processes")
        with workers.started(plans, told) as running:
            parameters = {name: running.answer(name) for name in plans}
            title = f"{model}, {parameters[EAGER] / 1e6:.1f} M parameters, {plan.dtype} on {device}"
            say(f"model: {title}")
            found = _found(running, plan, told, math.inf if steps else SECONDS)
            restored = running.ask(PATCHED, "end")
    _tell(device, found, data)
    picture.draw(output, title, found)
    say(f"\npicture of losses, speed and memory: {output}")
    _tell_restored(found.report, restored)


def choose(model: str, device: str) -> tuple[str | tuple[str, ...], str]:
    """What to include for a model on a device, and the words for it.

    The kernels that "auto" takes there, else all in plain PyTorch that the model has places for.
    """
    specs = [spec for spec in architectures()[model].sites if exists_here(spec)]
    ops = {known()[spec.code].op for spec in specs}
    usable = [kernel for kernel in registry.usable_on(device) if kernel.op in ops]
    auto = tuple(kernel.kernel_id for kernel in usable if device in kernel.default_on)
    if auto and device == devices.current():
        return "auto", f'{", ".join(auto)} ("auto" on this device)'
    if auto:
        return auto, f"{', '.join(auto)} (the defaults on {device})"
    plain = tuple(kernel.kernel_id for kernel in usable if kernel.backend == "torch")
    return plain, f'{", ".join(plain)} (all in PyTorch, as "auto" takes none on {device})'


def _check(model: str, device: str, output: Path) -> None:
    """Raise, as ``compare`` says, for what can be known before the training."""
    if model not in models.MODELS:
        raise unknown("demo model", model, models.MODELS)
    if device not in DTYPES:
        raise unknown("device", device, DTYPES)
    _check_variables()
    if settings.disabled():
        raise KernelPatchError("HF_KERNEL_PATCH_DISABLE is set")
    if why := devices.why_not(device):
        raise KernelUnavailableError(why)
    if devices.missing_package("matplotlib"):
        raise KernelPatchError("the picture needs matplotlib: pip install 'hf_kernel_patch[bench]'")
    picture.check(output)


def _check_variables() -> None:
    """ValueError for a variable that cannot be read: other programs will stumble over it."""
    for flag in ("COUNT", "CAPTURE"):
        settings.flag(flag)
    with suppress(KernelUnavailableError):
        patched()


def _default_device() -> str:
    current = devices.current()
    return current if current in DTYPES else "cpu"


def _found(running: workers.Workers, plan: Plan, told: Lines | Bar, seconds: float) -> Comparison:
    """All that is measured: the training, what it was patched with, decoding, the loss alone."""
    runs = _trained(running, plan.steps, told, seconds)
    report = running.ask(PATCHED, "report")
    if not report.patched:
        raise KernelPatchError(f"nothing was patched: {report}")
    told.begin("decoding", DECODINGS)
    end = time.monotonic() + DECODING_SECONDS
    for number in range(DECODINGS):
        for name, (text, duration) in running.ask_all("decode").items():
            runs[name].text = text
            if number:
                runs[name].token_seconds.append(duration)
        told.step(number + 1)
        if number and time.monotonic() > end:
            break
    report = running.ask(PATCHED, "report")
    told.begin("measuring the memory of the loss")
    for name, used in running.ask_all("loss_memory").items():
        runs[name].loss_memory = used
    size = plan.size
    return Comparison(runs, report, size.batch * size.length, size.loss_tokens)


def _trained(
    running: workers.Workers, steps: int, told: Lines | Bar, seconds: float
) -> dict[str, Measured]:
    """The runs, which take turns step by step until all steps are done or the time is over."""
    runs = {EAGER: Measured(), PATCHED: Measured()}
    told.begin("training", steps)
    end = time.monotonic() + seconds
    for step in range(steps):
        # Each goes first every other time, so that neither gains by its place.
        for name in (EAGER, PATCHED)[:: 1 if step % 2 else -1]:
            loss, duration = running.ask(name, "step")
            runs[name].losses.append(loss)
            runs[name].seconds.append(duration)
        shown = ", ".join(f"{name} {run.losses[-1]:.2f}" for name, run in runs.items())
        told.step(step + 1, f"loss {shown}")
        if step and time.monotonic() > end:
            say(f"stopped after {step + 1} of {steps} steps: {seconds} seconds were over")
            break
    for name, used in running.ask_all("peak").items():
        runs[name].memory = used
    return runs


def _tell(device: str, found: Comparison, data: bytes) -> None:
    telling.say_fused(found.report)
    telling.say_comparison(device, found)
    telling.say_decoding(found, data[: worker.PROMPT].decode(errors="replace"))
    telling.say_loss(device, found)
    telling.say_measured(device, _gpu(device))


def _tell_restored(report: PatchReport, restored: dict[str, bool]) -> None:
    if lost := [site for site, same in restored.items() if not same]:
        raise KernelPatchError(f"not restored: {', '.join(lost)}")
    say(
        f"unpatched: {len(report.patched)} sites had been patched; all {len(restored)} of the "
        "table hold the very objects that they held before"
    )


def _gpu(device: str) -> str:
    """The name of the accelerator."""
    if device == "cpu":
        return ""
    import torch

    return str(getattr(torch, device).get_device_name())
