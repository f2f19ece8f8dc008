"""The model that a module belongs to, and what a choice for it depends on."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import platform
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.version import versions

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Of a config, what says nothing of shapes and of what is computed.
_NAMES = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "name_or_path",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_PACKAGES = ("hf-kernel-patch", "torch", "triton", "torch-npu", "transformers", "peft")


def root_with(module: nn.Module) -> Any:
    """The largest model of transformers that holds a module, of all that live; None for none.

    It looks at everything that Python holds, which takes a moment.
    """
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if base is None:
        return None
    kinds = _subclasses(base)
    found: Any = None
    most = 0
    for one in gc.get_referrers(*kinds) if kinds else ():
        if type(one) in kinds:
            held = list(one.modules())
            if len(held) > most and any(part is module for part in held):
                found, most = one, len(held)
    return found


def _subclasses(kind: type) -> set[type]:
    found: set[type] = set()
    todo = [kind]
    while todo:
        children: list[type] = type.__subclasses__(todo.pop())
        for child in children:
            if child not in found:
                found.add(child)
                todo.append(child)
    return found


def devices_of(model: nn.Module) -> set[torch.device]:
    """Where the model's weights are."""
    return {one.device for one in model.parameters()}


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until accelerators have done what they were asked for."""
    import torch

    for device in devices:
        wait = getattr(getattr(torch, device.type, None), "synchronize", None)
        if wait is not None and device.type not in ("cpu", "meta"):
            wait(*(() if device.type == "mps" else (device,)))


def capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be waited for."""
    import torch

    return torch.cuda.is_current_stream_capturing()


def name_of(device: torch.device) -> str:
    """The name of what computes: of an accelerator its own."""
    import torch

    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    named = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return str(named(device)) if named is not None else device.type


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def key_of(model: Any, training: bool, tokens: int) -> dict[str, Any]:
    """What a choice depends on, beside the kernels: as plain data.

    ``tokens`` are those of one call; sizes count as the same within a power of four.
    """
    weights = list(model.parameters())
    trained = sum(one.numel() for one in weights if one.requires_grad)
    every = sum(one.numel() for one in weights)
    installed = versions()
    return {
        "device": sorted({name_of(one) for one in devices_of(model)}),
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": _hash(getattr(model, "config", None)),
        "attention": str(getattr(getattr(model, "config", None), "_attn_implementation", "")),
        "dtype": sorted({str(one.dtype).removeprefix("torch.") for one in weights}),
        "autocast": _autocast(devices_of(model)),
        "mode": "training" if training else "inference",
        "checkpointing": training and _recomputes(model),
        "trained": "all" if trained == every else "some" if trained else "none",
        "size": round(math.log(max(tokens, 1), 4)),
        "versions": {name: installed.get(name) for name in _PACKAGES},
    }


def _recomputes(model: nn.Module) -> bool:
    """Whether activations are computed again in the backward."""
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def _autocast(devices: Iterable[torch.device]) -> list[str]:
    import torch

    return sorted(
        str(torch.get_autocast_dtype(one.type)).removeprefix("torch.")
        for one in devices
        if one.type != "meta" and torch.is_autocast_enabled(one.type)
    )


def _hash(config: Any) -> str:
    """The first digits of the SHA-256 of a config without names."""
    data = config.to_dict() if hasattr(config, "to_dict") else {}
    text = json.dumps(_plain(data), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in _NAMES}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
