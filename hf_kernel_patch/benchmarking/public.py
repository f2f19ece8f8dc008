"""``bench``: a model as it is and patched, each op alone and left out, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.benchmarking.choosing import ROUNDS, Choice
from hf_kernel_patch.benchmarking.result import Benchmark
from hf_kernel_patch.benchmarking.running import Run
from hf_kernel_patch.settings import UNSET, Config, Include, Names, Options

if TYPE_CHECKING:
    from torch import nn


def bench(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    include: Include = UNSET,
    *,
    exclude: Names | None = UNSET,
    models: Names = UNSET,
    backend: str = UNSET,
    options: Options = UNSET,
    config: Config = None,
    train: bool = True,
    decode: int = 32,
    rounds: int = ROUNDS,
    ops: bool = True,
    compile: bool = False,
    seed: int = 0,
    progress: Callable[[str], object] = print,
) -> Benchmark:
    """Measure speed and memory of a model as it is and patched, and what each op gains.

    A training step is a forward with labels and a backward, without an optimizer; decoding is
    greedy, by ``generate``. Each variant has a turn in each round, in an order that changes, and
    two calls in a turn: one whose memory is measured, one that is timed. What is patched is chosen
    as for ``patch_transformers``. The model's weights, gradients, buffers and mode and the state of
    random numbers are the same afterwards, and nothing is patched, also after an error.

    Liger is measured by the command ``hf-kernel-patch bench`` alone: it patches a process for good.

    Args:
        model: a PreTrainedModel, or a module that wraps one; on any device.
        batch: what its forward takes, with labels; random tokens by default. ``generate`` is given
            the same without labels.
        train: whether a training step is measured.
        decode: how many tokens are decoded for each sequence; 0 for no decoding.
        rounds: turns of each variant. With fewer than 8 no gain can be told from noise.
        ops: whether each op is also measured alone, and left out of the whole.
        compile: whether what torch.compile makes of the unpatched model is measured as well. Its
            caches are reset afterwards.
        seed: of dropout, of random tokens and of the order of the turns.
        progress: is called with a line now and then.

    Raises:
        TypeError: ``model`` is no transformers model, or ``batch`` no mapping to tensors.
        ValueError: an argument cannot be used; or the model is compiled or has no weights.
        KernelPatchError: something is patched already, no kernel serves the model here, or neither
            a training step nor decoding can be run.
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
    choice = Choice(arguments, train, decode, rounds, ops, compile, seed)
    return Run(model, batch, choice, Lines(progress)).result()


class Lines:
    """Tells how far things are by a function that takes lines: at most ten a part."""

    def __init__(self, say: Callable[[str], object]):
        self._say, self._title, self._steps, self._told = say, "", 0, -1

    def begin(self, title: str, steps: int | None = None) -> None:
        """A part begins, of so many steps."""
        self._title, self._steps, self._told = title, steps or 0, -1
        if not steps:
            self._say(title)

    def step(self, done: int, text: str = "") -> None:
        """So many steps are done."""
        tenth = 10 * done // max(self._steps, 1)
        if tenth > self._told:
            self._told = tenth
            self._say(f"{self._title}: {done} of {self._steps}, {text}")
