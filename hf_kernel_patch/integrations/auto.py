"""``AutoModelForCausalLM`` of transformers, whose models come patched."""

from __future__ import annotations

from typing import Any

# Not of transformers itself, a lazy module that fails while another thread imports it.
from transformers.models.auto.modeling_auto import AutoModelForCausalLM as _Original

from hf_kernel_patch import settings
from hf_kernel_patch.api import apply_default_kernels
from hf_kernel_patch.patching.choosing import auto_unless_said, choose
from hf_kernel_patch.settings import UNSET


class AutoModelForCausalLM(_Original):
    """Takes the place of the one of transformers: its models have kernels applied, no other model.

    ``from_pretrained`` and ``from_config`` take these beside what they take there:

    - ``kernels``: "auto" (the default) or True, this device's default kernels; "measured", those
      that pay; None or False, nothing; otherwise ids, as a comma-separated string or an iterable.
    - ``kernel_exclude``, ``kernel_options``, ``kernel_config``: as ``apply_default_kernels`` takes
      ``exclude``, ``options`` and ``config``.

    A wrong name raises before the model is loaded. ``unpatch(model)`` gives the model back.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of transformers, with the kernels applied to the model."""
        chosen = _taken(kwargs)
        loaded = _Original.from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # of output_loading_info
        apply_default_kernels(model, **chosen)
        return loaded

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As of transformers, with the kernels applied to the model."""
        chosen = _taken(kwargs)
        return apply_default_kernels(_Original.from_config(*args, **kwargs), **chosen)


def _taken(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take what is about kernels out of the arguments, as ``apply_default_kernels`` names it."""
    config: settings.Config = kwargs.pop("kernel_config", None)
    include = auto_unless_said(kwargs.pop("kernels", UNSET), config)
    others = {name: kwargs.pop(f"kernel_{name}", UNSET) for name in ("exclude", "options")}
    choose(config, include=include, **others)  # a mistake is told now
    return {"include_kernels": include, "config": config, **others}


AutoModelForCausalLM.__module__ = "hf_kernel_patch"  # by which pickles find it
