"""Building the model that a user names: saved weights, or random ones of a model type."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import devices
from hf_kernel_patch.errors import KernelPatchError, cut, shown, unknown
from hf_kernel_patch.workload.finding import cached_file, file_of_folder, not_found
from hf_kernel_patch.workload.seeds import seeded
from hf_kernel_patch.workload.shrinking import OF_TYPE, layers_of, shrink, with_layers

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("float32", "bfloat16", "float16")
#: Names in transformers.models.auto.modeling_auto of {model type: class}, the best first.
_HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)
#: What weights are saved as.
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


def load(
    model: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    tiny: bool = True,
    layers: int | None = None,
    seed: int = 0,
    tell: Callable[[str], object] = print,
) -> nn.Module:
    """A causal language model, or another that transformers gives a head over a vocabulary.

    Args:
        model: the folder of a saved model or of an adapter of PEFT, a model type such as "llama",
            or a name on the Hub that is in the local cache. A folder that has a config.json alone
            gets random weights, as a model type does.
        dtype: "float32", "bfloat16" or "float16"; by default that of the saved weights, and of
            random ones float32 on a CPU and bfloat16 elsewhere.
        device: such as "cuda" or "cuda:1"; by default the accelerator that is here, else the CPU.
        tiny: of a model type: a model of some small layers. Otherwise the widths are its config's
            defaults.
        layers: how many layers, the first ones of a saved model; by default all, and of a tiny one
            as few as show each kind of them.
        seed: of random weights.
        tell: is called with a line where there is something to say.

    Returns:
        The model, in evaluation mode, as ``from_pretrained`` gives it.

    Raises:
        ValueError: there is no such model, dtype or device, or its class is not in transformers.
        KernelPatchError: transformers cannot build or load it; the message has its error.
    """
    import torch

    chosen = _dtype(dtype)
    where = _device(device)
    for name, value, least in (("layers", 1 if layers is None else layers, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is a number of at least {least}, not {shown(value)}")
    if not isinstance(model, str) or not model:
        raise ValueError(f"expected a folder or a model type, got {shown(model)}")
    folder = _folder(model)
    if folder is not None and (folder / "adapter_config.json").exists():
        return _with_adapter(folder, chosen, where, layers, seed, tell)
    if folder is not None and not (folder / "config.json").exists():
        raise ValueError(f"{cut(str(folder))} has no config.json: it is no saved model")
    if folder is not None and any(next(folder.glob(one), None) for one in _WEIGHTS):
        return _saved(folder, chosen, layers).to(where).eval()
    if folder is not None:
        kind, config = _described(folder)
        tell(f"{cut(str(folder))} has no weights: they are random")
    else:
        kind = _class_of(model)
        with _told(f"make a config of {model}"):
            changes = OF_TYPE.get(model, {})
            config = shrink(kind.config_class, changes) if tiny else kind.config_class()
    if layers is not None:
        config = with_layers(config, layers)
    small = torch.float32 if where.type == "cpu" else torch.bfloat16
    with _told(f"build a {kind.__name__}"):
        made = _random(kind, config, chosen or small, where, seed)
        return _lively(made, seed) if tiny and folder is None else made


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    if name is None:
        return None
    plain = str(name).removeprefix("torch.")
    if plain not in DTYPES:
        raise unknown("dtype", plain, DTYPES)
    found: torch.dtype = getattr(torch, plain)
    return found


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device(devices.current())
    try:
        found = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"unknown device {shown(name)}; known are cpu and {devices.current()}, with a number "
            "such as cuda:1"
        ) from None
    if why := devices.why_not(found.type):
        raise ValueError(f"device {shown(name)}: {why}")
    if found.index is not None and found.type != "cpu":
        count = getattr(torch, found.type).device_count()
        if found.index >= count:
            raise ValueError(f"device {shown(name)}: there are {count} here")
    return found


def _folder(model: str) -> Path | None:
    """Where the files of the model are; None for a model type, ValueError where it is neither."""
    file = file_of_folder(model)
    if file is not None:
        return file.parent
    if model in _model_types():
        return None
    found = cached_file(model) or cached_file(model, "adapter_config.json")
    if found is None:
        raise not_found(model, _model_types())
    return found.parent


def _model_types() -> list[str]:
    from transformers import CONFIG_MAPPING

    return [*CONFIG_MAPPING.keys()]


def _class_of(model_type: str) -> Any:
    """The class of a model type that has a head over a vocabulary."""
    import transformers
    from transformers.models.auto import modeling_auto

    for table in _HEADS:
        name = getattr(modeling_auto, table, {}).get(model_type)
        if name is not None:
            name = name if isinstance(name, str) else name[0]
            try:
                return getattr(transformers, name)
            except Exception as error:
                raise _cannot(f"import {name}", error) from error
    raise ValueError(
        f"{model_type!r} has no class in transformers that reads tokens and has a loss over a "
        "vocabulary; load the model yourself and call hf_kernel_patch.verify(model, batch)"
    )


def _described(folder: Path) -> tuple[Any, Any]:
    """The class and the config of a folder."""
    import transformers
    from transformers import AutoConfig

    with _told(f"read {cut(str(folder / 'config.json'))}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    names = getattr(config, "architectures", None) or []
    kind = next((found for one in names if (found := getattr(transformers, one, None))), None)
    if kind is None and getattr(config, "auto_map", None):
        raise ValueError(
            f"{cut(str(folder))} brings code of its own, which is not run here; load the model "
            "yourself with trust_remote_code and call hf_kernel_patch.verify(model, batch)"
        )
    return kind or _class_of(config.model_type), config


def _saved(folder: Path, dtype: torch.dtype | None, layers: int | None) -> Any:
    kind, config = _described(folder)
    if layers is not None:
        if layers > (held := layers_of(config)):
            raise ValueError(f"layers: {cut(str(folder))} has {held}, which is less than {layers}")
        config = with_layers(config, layers)
    with _told(f"load {cut(str(folder))}"):
        made = kind.from_pretrained(folder, config=config, local_files_only=True, **_as(dtype))
        return made


def _as(dtype: torch.dtype | None) -> dict[str, Any]:
    """The argument by which from_pretrained takes a dtype, which version 5 has renamed."""
    import transformers
    from packaging.version import Version

    name = "dtype" if Version(transformers.__version__) >= Version("5") else "torch_dtype"
    return {name: dtype or "auto"}


def _with_adapter(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    layers: int | None,
    seed: int,
    tell: Callable[[str], object],
) -> nn.Module:
    """An adapter of PEFT on its base model."""
    if devices.missing_package("peft"):
        raise ValueError(f"{cut(str(folder))} is an adapter: pip install peft to load it")
    if layers is not None:
        raise ValueError("layers cannot be chosen where an adapter belongs to all of them")
    from peft import PeftModel

    written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = written.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{cut(str(folder))}: adapter_config.json names no base model")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    # A relative path is as the training's, or as the adapter's own folder.
    beside = folder / base
    loaded = load(
        str(beside) if beside.is_dir() else base,
        dtype=name,
        device=str(device),
        seed=seed,
        tell=tell,
    )
    with _told(f"load the adapter {cut(str(folder))}"):
        made: nn.Module = PeftModel.from_pretrained(loaded, str(folder), is_trainable=True)
        return made.eval()


def _random(kind: Any, config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """A model with random weights; the same for each seed on one kind of device."""
    import torch

    before = torch.get_default_dtype()
    with seeded(seed):
        torch.set_default_dtype(dtype)
        try:
            with device:
                made = kind(config)
        finally:
            torch.set_default_dtype(before)
    return made.to(device).eval()


def _lively(model: Any, seed: int) -> Any:
    """Weights that show an error: norms that scale, biases that add, routers that are decided."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like) * 0.1

    with torch.no_grad():
        for name, one in model.named_parameters():
            odd = not one.isfinite().all() or one.abs().max() > 1e3
            if odd or (one.dim() > 1 and not one.any()):
                one.copy_(noise(one))  # nothing has initialised it, or to nothing
            if name.endswith("A_log"):  # linear attention that remembers
                one.copy_(-1.0 - 2.0 * torch.rand(one.shape, generator=generator).to(one))
            elif name.endswith((".gate.weight", ".router.weight")):
                one.mul_(16)  # a router that a rounding does not change the mind of
            elif one.dim() == 1:
                one.add_(noise(one))
    return model


@contextmanager
def _told(what: str) -> Iterator[None]:
    """An error of transformers as ours, which a command tells in a line."""
    try:
        yield
    except Exception as error:
        raise _cannot(what, error) from error


def _cannot(what: str, error: Exception) -> KernelPatchError:
    return KernelPatchError(
        f"transformers cannot {what}: {type(error).__name__}: {cut(str(error), 500)}"
    )
