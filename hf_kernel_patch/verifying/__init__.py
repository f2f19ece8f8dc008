"""How far each patched site of a model is from the truth, beside the original itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.api import count_calls, require_unpatched
from hf_kernel_patch.errors import shown
from hf_kernel_patch.patching.block import patched
from hf_kernel_patch.patching.model_patch import require_model
from hf_kernel_patch.recognition import site as sites
from hf_kernel_patch.settings import UNSET, Config, Include, Names, Options
from hf_kernel_patch.verifying.comparing import FACTOR, Measure, check_factor
from hf_kernel_patch.verifying.keeping import kept, require_weights, unwrapped
from hf_kernel_patch.verifying.runs import Run
from hf_kernel_patch.verifying.verification import Checked, Verdict, Verification, dtypes_of
from hf_kernel_patch.workload import as_batch, device_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FACTOR", "Checked", "Measure", "Verdict", "Verification", "verify"]

#: How many layers are held at once, with what they are given, their gradients and their truth.
LAYERS_AT_ONCE = 4


def verify(
    model: nn.Module,
    batch: Mapping[str, Any],
    include: Include = UNSET,
    *,
    exclude: Names | None = UNSET,
    models: Names = UNSET,
    backend: str = UNSET,
    options: Options = UNSET,
    config: Config = None,
    train: bool = True,
    factor: float = FACTOR,
    whole: bool = True,
    layers_at_once: int = LAYERS_AT_ONCE,
    seed: int = 0,
    progress: Callable[[str], object] = lambda line: None,
) -> Verification:
    """Compare each site of a model, patched and original, with the original in float64.

    Each site is patched by itself and run on what the original model gives it, forward and
    backward; so one that is wrong is not blamed on those after it. Then the whole model is run
    with every site patched. What is patched is chosen as for ``patch_transformers``. Nothing is
    patched afterwards, and the model is as it was.

    Args:
        model: a transformers model, or what wraps one, such as a model of PEFT.
        batch: the arguments of its forward; with labels, if the loss is to be seen.
        train: run it in training mode, without dropout; the loss is fused there alone.
        factor: how many times eager's own error the error of a site may be, beside a rounding.
        whole: compare the whole model, too.
        layers_at_once: how many layers are looked at together; less of them need less memory.
        seed: of the gradients that are sent back into each module.
        progress: is called with a line before each step.

    Raises:
        KernelPatchError: something is patched already, the model has no weights, or it cannot be
            run on the batch.
        TypeError: ``model`` or ``batch`` is none.
    """
    require_model(model)
    model = unwrapped(model)
    given = as_batch(batch, model)
    factor = check_factor(factor)
    for name, number, least in (("layers_at_once", layers_at_once, 1), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name} is a number of at least {least}, not {shown(number)}")
    arguments: dict[str, Any] = {
        "include": include,
        "exclude": exclude,
        "models": models,
        "backend": backend,
        "options": options,
        "config": config,
        "strict": False,
    }
    patched(**arguments)  # a mistake is told now
    require_unpatched(pending=True)
    require_weights(model)
    if "use_cache" not in given and _takes_cache(model):
        given["use_cache"] = False
    with kept(model, train), _counting():
        # Tensors of a block of inference mode take no part in gradients.
        given = {k: v.clone() if hasattr(v, "clone") else v for k, v in given.items()}
        run = Run(model, given, arguments, factor, seed, progress)
        rows = run.rows(layers_at_once)
        compared_whole, note = run.whole() if whole and rows else ((), "")
    return Verification(
        rows=tuple(rows),
        whole=tuple(compared_whole),
        note=note,
        factor=factor,
        dtype=dtypes_of(model),
        device=str(device_of(model)),
        train=train,
    )


@contextmanager
def _counting() -> Iterator[None]:
    before = sites.counting
    count_calls()
    try:
        yield
    finally:
        count_calls(before)


def _takes_cache(model: Any) -> bool:
    """Whether a cache of keys can be asked for or not, whatever the config says."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "use_cache" in inspect.signature(inner.forward).parameters
