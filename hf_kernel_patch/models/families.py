"""The model families of the installed transformers, found without importing them."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

PREFIX = "transformers.models."
#: Where transformers puts the code that comes with a model's weights.
REMOTE = "transformers_modules."
#: Layers that go around those of any model; ``models="peft"`` names them.
ADAPTERS = "peft.tuners.lora."


@cache
def families() -> dict[str, tuple[str, ...]]:
    """Every folder of transformers.models with modelling modules -> their full names."""
    found = {}
    models = _folder()
    for folder in models.iterdir() if models else ():
        files = sorted(folder.glob("modeling_*.py"))
        # The versions for TensorFlow and Flax, which transformers 4 has.
        names = [
            one.stem for one in files if not one.stem.startswith(("modeling_tf_", "modeling_flax_"))
        ]
        if names:
            found[folder.name] = tuple(f"{PREFIX}{folder.name}.{name}" for name in names)
    return dict(sorted(found.items()))


def _adapters() -> tuple[str, ...]:
    package = _package("peft")
    files = package.joinpath("tuners", "lora").glob("[!_]*.py") if package else ()
    return tuple(sorted(ADAPTERS + file.stem for file in files))


@cache
def _folder() -> Path | None:
    package = _package("transformers")
    return package / "models" if package else None


def _package(name: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def find_modules(model_type: str) -> tuple[str, ...]:
    """The modelling modules of a model type of the installed transformers; () if there are none.

    The one that is named after its folder is the first.
    """
    if model_type == "peft":
        return _adapters()
    folders = families()
    names = [model_type, model_type.replace("-", "_")]
    names += [name.removesuffix(part) for name in names for part in ("_text", "_vision", "_audio")]
    folder = next((name for name in names if name in folders), "") or _folder_of(model_type)
    own = f"{PREFIX}{folder}.modeling_{folder}"
    return tuple(sorted(folders.get(folder, ()), key=lambda name: (name != own, name)))


def file_of(module: str) -> Path:
    """The file of a modelling module of transformers."""
    models = _folder() or Path()
    return models.joinpath(*module.removeprefix(PREFIX).split(".")).with_suffix(".py")


def _folder_of(model_type: str) -> str:
    """The folder that transformers itself names for a model type, or ""."""
    try:
        from transformers.models.auto.configuration_auto import (
            CONFIG_MAPPING_NAMES,
            model_type_to_module_name,
        )
    except ImportError:
        return ""
    return str(model_type_to_module_name(model_type)) if model_type in CONFIG_MAPPING_NAMES else ""


def is_modelling(module: str) -> bool:
    """Whether a module of that name holds models: of transformers, remote code, or adapters."""
    if module.startswith((REMOTE, ADAPTERS)):
        return True
    return module.startswith(PREFIX) and module.rpartition(".")[2].startswith("modeling_")


def family_of(module: str) -> str:
    """The name under which a module's sites are reported: its folder in transformers."""
    if module.startswith(PREFIX):
        return module.removeprefix(PREFIX).partition(".")[0]
    return "peft" if module.startswith(ADAPTERS) else module
