"""What is installed here, what it lets us patch, and who else has patched it."""

from __future__ import annotations

import sys
from typing import Any

from hf_kernel_patch import devices, models, registry
from hf_kernel_patch.cli.preview import import_modelling
from hf_kernel_patch.models import SiteSpec
from hf_kernel_patch.ops._shared.collection import no_collection
from hf_kernel_patch.patching.lookup import describe, exists_here, locate
from hf_kernel_patch.recognition import known
from hf_kernel_patch.recognition.source import innermost, original_of
from hf_kernel_patch.version import newer_than_tested, versions

#: What has to be there -> what does not work without it.
NEEDED = {
    "torch": "no kernel can run and nothing can be patched",
    "transformers": "there is nothing to patch; kernels can still be called as functions",
}


def examine() -> dict[str, Any]:
    """Versions, devices, kernels, every row of every table, and foreign patches, as plain data."""
    with no_collection():  # what is imported stays: looking for garbage takes a seventh of the time
        problems = _problems()
        tables = [] if problems else rows()
    return {
        "versions": versions(),
        "newer": newer_than_tested(),
        "problems": problems,
        "devices": found_devices(),
        "kernels": {
            "all": list(registry.kernels()),
            "available": registry.available(),
            "default": [kernel.kernel_id for kernel in registry.defaults().values()],
        },
        "tables": tables,
        "foreign": [
            {"site": row["site"], "by": row["foreign"], "effect": row["reason"] or "looked through"}
            for row in tables
            if row["foreign"]
        ],
    }


def _problems() -> list[str]:
    """What is missing here, and in how far everything works without it."""
    found = []
    for package, effect in NEEDED.items():
        if why := devices.why_not_importable(package):
            found.append(f"{package} {why}: {effect}; `pip install {package}` brings it")
    if found:
        found.append(
            "what works without: importing hf_kernel_patch, reading settings, and the commands "
            "list and doctor"
        )
    return found


def found_devices() -> list[dict[str, Any]]:
    """Every device usable here; the accelerator that "auto" looks at is ``current``."""
    if devices.why_not_importable("torch"):
        return [{"device": "cpu", "name": "without torch", "current": True}]
    import torch

    current = devices.current()
    found = [{"device": "cpu", "name": f"{torch.get_num_threads()} threads"}]
    if current != "cpu":
        module = torch.get_device_module(current)
        describe_one = getattr(module, "get_device_name", lambda index: current)
        found += [
            {"device": f"{current}:{index}", "name": describe_one(index)}
            for index in range(module.device_count())
        ]
    return [{**one, "current": one["device"].partition(":")[0] == current} for one in found]


def rows() -> list[dict[str, Any]]:
    """One entry for each site that the installed transformers should have and an op serves.

    ``reason`` says why it would be skipped, or is None; ``foreign`` names the code of another
    package that stands there, or is None.
    """
    broken = import_modelling(models.architectures())
    return [
        {
            "architecture": architecture.name,
            "site": spec.name,
            "code": spec.code,
            **(
                {"reason": broken[architecture.name], "foreign": None}
                if spec.module not in sys.modules
                else _check(spec)
            ),
        }
        for architecture in models.architectures().values()
        for spec in architecture.sites
        if exists_here(spec)
    ]


def _check(spec: SiteSpec) -> dict[str, str | None]:
    found = locate(spec)
    if isinstance(found, str):
        return {"reason": found, "foreign": None}
    owner, _, value = found
    original = original_of(value)
    return {
        "reason": known()[spec.code].why_not(original, owner),
        "foreign": foreign(original, spec.module.partition(".")[0]),
    }


def foreign(value: object, package: str) -> str | None:
    """What of another package stands at a place of ``package``, outermost or inside wrappers."""
    for layer in (value, innermost(value)):
        module = getattr(layer, "__globals__", {}).get("__name__") or type(layer).__module__
        top = module.partition(".")[0]
        # transformers' own use of contextlib is nobody's patch.
        if top != package and top not in sys.stdlib_module_names:
            return describe(layer) if layer is not value else f"{_name(value)} of {module}"
    return None


def _name(value: object) -> str:
    return getattr(value, "__qualname__", None) or type(value).__qualname__
