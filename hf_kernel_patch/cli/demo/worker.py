"""One training run, as it is or patched, in a process of its own."""

from __future__ import annotations

import importlib
import signal
import time
import traceback
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.api import count_calls, patch_transformers, unpatch
from hf_kernel_patch.cli.demo import memory
from hf_kernel_patch.cli.demo.models import load
from hf_kernel_patch.cli.demo.text import batches
from hf_kernel_patch.errors import KernelPatchWarning
from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching.lookup import exists_here, locate

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import Tensor, nn
    from torch.optim import Optimizer

BATCH, LENGTH = 8, 128
LEARNING_RATE, RAMP = 2e-3, 10


@dataclass(frozen=True)
class Plan:
    """One run; ``include`` is what ``patch_transformers`` takes, None for the eager one."""

    model: str
    directory: str
    text: bytes
    steps: int
    seed: int
    device: str
    dtype: str
    include: str | tuple[str, ...] | None


def main(pipe: Connection) -> None:
    """What the process runs; the parent is the one that an interrupt ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(pipe)


def serve(pipe: Connection) -> None:
    """Take a plan from the pipe, then answer each message with the next thing of the run.

    A true message ends the training early. What goes wrong is sent as a string.
    """
    try:
        run = training(pipe.recv())
        pipe.send(next(run))
        while True:
            pipe.send(run.send(pipe.recv()))
    except (EOFError, StopIteration):
        pass
    except Exception:
        pipe.send(traceback.format_exc())


def training(plan: Plan) -> Generator[Any, bool | None, None]:
    """Yields None once ready, (loss, seconds) for each step, and the facts at the end.

    Sending a true value ends the training early, so that the facts are next.
    The facts are a dictionary: ``report``, with the calls of the first step counted; ``memory``,
    the bytes at the peak, on a CPU what training added; ``originals``, whether each place holds,
    after ``unpatch``, the very object that it held at first.
    """
    import torch

    unpatch()  # what the environment may have asked for
    originals = _originals(plan.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelPatchWarning)  # the report says the same
        report = patch_transformers(
            plan.include, exclude=(), models=plan.model, backend="auto", strict=False
        )
    model = load(plan.directory, plan.device, plan.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    data = batches(plan.text, plan.steps, BATCH, LENGTH, plan.seed).to(plan.device)
    before = memory.reset(plan.device)
    yield None
    for step in range(plan.steps):
        count_calls(step == 0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / RAMP)
        if (yield _step(model, optimizer, data[step])):
            break
    used = memory.peak(plan.device) - before
    unpatch()
    after = _originals(plan.model)
    yield {
        "report": report,
        "memory": used,
        "originals": {site: after[site] is value for site, value in originals.items()},
    }


def _step(model: nn.Module, optimizer: Optimizer, ids: Tensor) -> tuple[float, float]:
    """(loss, seconds) of a whole training step."""
    from torch.nn.utils import clip_grad_norm_

    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()
    _synchronize(ids.device.type)
    return value, time.perf_counter() - start


def _synchronize(device: str) -> None:
    import torch

    getattr(torch, device).synchronize()


def _originals(model: str) -> dict[str, Any]:
    """Site -> what is there now, for every row of the model's table."""
    architecture = architectures()[model]
    importlib.import_module(architecture.module)
    found = {t.name: locate(t) for t in architecture.sites if exists_here(t)}
    return {site: place[2] for site, place in found.items() if not isinstance(place, str)}
