"""Which modules of a model a site is seen through, and in what order they are looked at."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.patching.lookup import calls_by_name
from hf_kernel_patch.patching.report import Row
from hf_kernel_patch.recognition.source import original_of

if TYPE_CHECKING:
    import torch
    from torch import nn


def modules_of_sites(model: nn.Module, rows: Iterable[Row]) -> dict[str, dict[str, nn.Module]]:
    """Site -> {path in the model: module} of the modules whose calls run it.

    A method is run by the modules of its class, a function by those whose forward calls it.
    """
    named = dict(model.named_modules())
    found: dict[str, dict[str, nn.Module]] = {}
    for site in dict.fromkeys(row.site for row in rows):
        owner, _, name = site.rpartition(".")
        function = vars(sys.modules[owner]).get(name) if owner in sys.modules else None
        for path, module in named.items():
            runs = (
                _defines(module, owner, name)
                if function is None
                else calls_by_name(module, name, original_of(function))
            )
            if runs:
                found.setdefault(site, {})[path] = module
    return found


def _defines(module: nn.Module, owner: str, name: str) -> bool:
    """Whether the method of that name that a module runs is that of the class ``owner``."""
    kind = next((one for one in type(module).__mro__ if name in vars(one)), None)
    return kind is not None and f"{kind.__module__}.{kind.__qualname__}" == owner


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> the layers of a model: what lies in its lists of modules, but not in one within."""
    from torch import nn

    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        if parent in lists and not any(parent.startswith(f"{one}.") for one in lists):
            found[path] = module
    return found


def layer_number(path: str) -> int | None:
    """The number in a module's path, such as 3 of ``model.layers.3.mlp``."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def groups(paths: Iterable[str], layers: Iterable[str], at_once: int) -> Iterator[list[str]]:
    """The paths of modules in groups of so many layers; first those that lie in no layer."""
    known = list(layers)
    by_layer: dict[str, list[str]] = {"": []}
    for path in paths:
        layer = next((one for one in known if f"{path}.".startswith(f"{one}.")), "")
        by_layer.setdefault(layer, []).append(path)
    if outside := by_layer.pop(""):
        yield outside
    held = list(by_layer.values())
    for begin in range(0, len(held), at_once):
        yield [path for one in held[begin : begin + at_once] for path in one]


def whole_parts(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> the children that are models themselves, such as the one under a head.

    What a site of ``module`` computes is looked at for what these have given.
    """
    base: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    return {name: child for name, child in module.named_children() if isinstance(child, base)}


def own_parameters(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters of a module, but for those of models inside of it."""
    inside = tuple(f"{name}." for name in whole_parts(module))
    for name, parameter in module.named_parameters():
        if not name.startswith(inside):
            yield parameter
