"""One run, as it is or patched, in a process of its own: training, decoding, the loss alone."""

from __future__ import annotations

import importlib
import math
import signal
import time
import traceback
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import registry
from hf_kernel_patch.api import count_calls, patch_transformers, unpatch
from hf_kernel_patch.benchmarking import memory
from hf_kernel_patch.benchmarking.memory import synchronize
from hf_kernel_patch.cli.demo.models import REAL_VOCABULARY, Size, build, build_for_loss
from hf_kernel_patch.cli.demo.text import batches
from hf_kernel_patch.errors import KernelPatchWarning
from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching.lookup import exists_here, locate

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from hf_kernel_patch.patching.report import PatchReport

RAMP = 10
#: Bytes that decoding begins with, and how many it adds.
PROMPT, NEW = 32, 64
LOSS = "linear_cross_entropy"


@dataclass(frozen=True)
class Plan:
    """One run; ``include`` is what ``patch_transformers`` takes, None for the one as it is."""

    model: str
    size: Size
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
    """Take a plan from the pipe, then answer each name of a method of ``Run`` with what it gives.

    What goes wrong is sent as a string.
    """
    try:
        run = Run(pipe.recv())
        pipe.send(run.parameters)
        while True:
            pipe.send(getattr(run, pipe.recv())())
    except (EOFError, OSError):  # the parent has gone
        pass
    except Exception:
        pipe.send(traceback.format_exc())


class Run:
    """A model with its optimizer; each method is called as often as the parent asks for it."""

    def __init__(self, plan: Plan):
        import torch

        self._plan = plan
        unpatch()
        self._originals = _originals(plan.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KernelPatchWarning)  # the report says the same
            self._report = patch_transformers(
                plan.include, exclude=(), models=plan.model, backend="auto", strict=False
            )
        self._model: Any = build(plan.model, plan.size, plan.seed, plan.device, plan.dtype)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), betas=(0.9, 0.95), weight_decay=0.1
        )
        data = batches(plan.text, plan.steps, plan.size.batch, plan.size.length, plan.seed)
        self._data = data.to(plan.device)
        self._done = 0
        self._before = memory.reset(plan.device)
        self.parameters = int(self._model.num_parameters())

    def step(self) -> tuple[float, float]:
        """(loss, seconds) of the next training step; the calls of the first are counted."""
        from torch.nn.utils import clip_grad_norm_

        count_calls(self._done == 0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.size.learning_rate * min(1.0, (self._done + 1) / RAMP)
        ids = self._data[self._done]
        start = time.perf_counter()
        loss = self._model(input_ids=ids, labels=ids).loss
        loss.backward()
        clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        value = loss.item()
        synchronize(self._plan.device)
        self._done += 1
        return value, time.perf_counter() - start

    def peak(self) -> int:
        """Bytes at the peak of the training so far, on a CPU what it added."""
        return memory.peak(self._plan.device) - self._before

    def decode(self) -> tuple[bytes, float]:
        """(bytes, seconds a byte) of greedy decoding after the first bytes of the text."""
        import torch

        device = self._plan.device
        prompt = torch.tensor([list(self._plan.text[:PROMPT])], device=device)
        self._model.eval()
        synchronize(device)
        start = time.perf_counter()
        with torch.no_grad():
            found = self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW,
                do_sample=False,
                use_cache=True,
                suppress_tokens=[256, 257, 258],  # which are no bytes
            )
        synchronize(device)
        seconds = time.perf_counter() - start
        self._model.train()
        return bytes(found[0, PROMPT:].tolist()), seconds / NEW

    def report(self) -> PatchReport:
        """What is patched, with the calls of the first training step."""
        return self._report

    def loss_memory(self) -> float | None:
        """Bytes that head and loss of a real vocabulary take at the peak, forward and backward.

        None where the system cannot forget an older, higher peak, infinite where it does not fit.
        Afterwards other kernels are in force in a patched run.
        """
        import torch

        plan = self._plan
        if not memory.resets(plan.device):
            return None
        if plan.include is not None:  # also where "auto" leaves it out
            kernel = _loss_kernel(plan.device)
            patch_transformers(kernel, exclude=(), models=plan.model, backend="auto", strict=True)
        try:
            model: Any = build_for_loss(plan.model, plan.size, plan.device, plan.dtype)
            shape = (1, plan.size.loss_tokens)
            ids = torch.randint(REAL_VOCABULARY, shape, device=plan.device)
            memory.reset(plan.device)
            before = memory.in_use(plan.device)
            model(input_ids=ids, labels=ids).loss.backward()
            return memory.peak(plan.device) - before
        except torch.OutOfMemoryError:
            return math.inf
        finally:
            model = None
            memory.give_back(plan.device)

    def end(self) -> dict[str, bool]:
        """Unpatch; whether each site of the model's table holds its first object again."""
        unpatch()
        after = _originals(self._plan.model)
        return {site: after[site] is value for site, value in self._originals.items()}


def _loss_kernel(device: str) -> str:
    """The id of the kernel for head and loss on a device, its own where it has one."""
    usable = [kernel for kernel in registry.usable_on(device) if kernel.op == LOSS]
    return max(usable, key=lambda kernel: kernel.device == device).kernel_id


def _originals(model: str) -> dict[str, Any]:
    """Site -> what is there now, for every row of the model's table."""
    architecture = architectures()[model]
    importlib.import_module(architecture.module)
    found = {t.name: locate(t) for t in architecture.sites if exists_here(t)}
    return {site: place[2] for site, place in found.items() if not isinstance(place, str)}
