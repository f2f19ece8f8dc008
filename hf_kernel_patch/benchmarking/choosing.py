"""What is asked of a benchmark, checked, and what its title says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.benchmarking.measuring import Turn
from hf_kernel_patch.benchmarking.workloads import sizes_of
from hf_kernel_patch.errors import cut, shown
from hf_kernel_patch.patching.model_patch import require_model

if TYPE_CHECKING:
    from torch import nn

#: Rounds, unless somebody says otherwise: an interval of 99% leaves one of each end out.
ROUNDS = 12


@dataclass(frozen=True)
class Choice:
    """What is measured, and how often.

    Attributes:
        arguments: of ``patched``, for the whole.
        train: whether a training step is measured.
        decode: how many tokens are decoded, 0 for none.
        rounds: turns of each variant.
        ops: whether each op is measured alone and left out.
        compiled: whether torch.compile is measured.
        seed: of dropout and of the order of the turns.
        now: gives seconds.
        others: further variants, by name.
    """

    arguments: Mapping[str, Any]
    train: bool = True
    decode: int = 32
    rounds: int = ROUNDS
    ops: bool = True
    compiled: bool = False
    seed: int = 0
    now: Callable[[], float] = time.perf_counter
    others: Mapping[str, Turn] = field(default_factory=dict)


def check(choice: Choice) -> None:
    """ValueError for a number that is none, or nothing to measure."""
    for name, value, least in (
        ("rounds", choice.rounds, 1),
        ("decode", choice.decode, 0),
        ("seed", choice.seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is a number of at least {least}, not {shown(value)}")
    if not choice.train and not choice.decode:
        raise ValueError("nothing to measure: neither train nor decode")


def check_model(model: nn.Module) -> None:
    """TypeError or ValueError for a model that cannot be measured as it stands."""
    require_model(model)
    if any(getattr(one, "_compiled_call_impl", None) for one in model.modules()) or hasattr(
        model, "_orig_mod"
    ):
        raise ValueError(
            "the model is compiled; give the one that torch.compile was given, and compile=True "
            "measures the compiled one too"
        )
    if any(one.is_meta for one in model.parameters()):
        raise ValueError("the model has weights on the meta device, so it cannot be run")


def devices_of(model: nn.Module) -> tuple[str, ...]:
    """Where the model's weights are: its accelerators, or the CPU where it is on none."""
    names = sorted({str(one.device) for one in model.parameters()})
    return tuple(name for name in names if name != "cpu") or ("cpu",)


def title_of(model: Any, batch: Mapping[str, Any], devices: tuple[str, ...]) -> str:
    """The model, its size, where it is and what it is given."""
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_hidden_layers", None)
    dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in model.parameters()})
    count = sum(one.numel() for one in model.parameters())
    parts = [
        cut(type(base).__qualname__) + (" with an adapter" if base is not model else ""),
        *([f"{layers} layer{'s' * (layers != 1)}"] if isinstance(layers, int) else []),
        f"{count / 1e6:,.1f} M parameters",
        f"{' and '.join(dtypes)} on {' and '.join(map(_named, devices))}",
        f"batch of {' x '.join(map(str, sizes_of(batch)))}",
        *(["gradient checkpointing"] if _checkpoints(base) else []),
    ]
    return ", ".join(parts)


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(one, "gradient_checkpointing", False) is True for one in model.modules())


def _named(device: str) -> str:
    import torch

    kind = device.partition(":")[0]
    name = getattr(getattr(torch, kind, None), "get_device_name", None)
    if kind == "cpu" or name is None:
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' * (threads != 1)})" if kind == "cpu" else device
    return f"{device} ({name(torch.device(device))})"
