"""Where a model that a user names has its files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hf_kernel_patch import models
from hf_kernel_patch.errors import cut, unknown


def file_of_folder(model: str, name: str = "config.json") -> Path | None:
    """Where a folder has a file of that name, or None where ``model`` is no folder."""
    if os.path.isdir(model):  # Path.is_dir raises for a name too long
        return Path(model, name)
    if os.path.isfile(model):
        raise ValueError(f"{cut(model)} is a file; give the folder that it is in")
    return None


def cached_file(model: str, name: str = "config.json") -> Path | None:
    """A file of a name on the Hub, where it was downloaded before; downloads nothing."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, name)
    except (ImportError, ValueError):  # the last for what cannot be such a name
        return None
    return Path(found) if isinstance(found, str) else None


def not_found(model: str, known: Iterable[str] = ()) -> ValueError:
    """The error for a name that is neither a folder nor a model type, nor in the local cache.

    ``known`` are the model types; without it, those that can be patched.
    """
    if re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", model):
        return ValueError(
            f"{model!r} is no folder here, and as a name on the Hub it is not in the local cache. "
            "Give the folder of a saved model, or the model type, such as 'llama'; or download the "
            f"model's config.json first, as `hf download {model} config.json` does"
        )
    types = set(known) or models.names_of_all()
    return unknown("model type or directory", model, types)
