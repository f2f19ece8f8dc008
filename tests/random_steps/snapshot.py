"""Every object that this package may touch, by identity, and its own bookkeeping."""

from __future__ import annotations

import copy
import copyreg
import importlib
import sys
from typing import Any

from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching import model_patch, modules, records, watching
from hf_kernel_patch.patching import subclass as subclasses
from hf_kernel_patch.patching.imports import ImportWatcher
from hf_kernel_patch.patching.ledger import ledger
from hf_kernel_patch.recognition import composing
from hf_kernel_patch.recognition.source import ROOT, made_by_us
from tests.random_steps.worlds import FAMILIES, LATE, Violation, plain, real

#: Modules whose globals, and whose classes' members, are watched.
WATCHED = (
    "torch.nn.modules.module",
    "torch.nn.modules.linear",
    "torch.nn.modules.activation",
    "torch.nn.functional",
    "transformers.activations",
    "transformers.modeling_utils",
    "transformers.modeling_layers",
    "transformers.modeling_outputs",
    "transformers.loss.loss_utils",
    "transformers.generation.utils",
    "transformers.integrations.sdpa_attention",
    "copy",
    "pickle",
)
#: What transformers and torch keep anew at each use.
KEPT_ANEW = (
    "__abstractmethods__",
    "_abc_impl",
    "__warningregistry__",
    "_can_set_attn_implementation_cached_value",
)


class Snapshot:
    """(owner, name) -> object of classes, modules and registries, and the names of modules."""

    def __init__(self) -> None:
        tables = [table for name, table in architectures().items() if name != LATE]
        names = [table.module for table in tables if table.module in sys.modules]
        every = [importlib.import_module(name) for name in dict.fromkeys([*WATCHED, *names])]
        every += [module(family) for family in FAMILIES for module in (real, plain)]
        self.owners: dict[int, Any] = {}
        for module in every:
            self.owners[id(module)] = module
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == module.__name__:
                    self.owners[id(value)] = value
        self.mappings = self._mappings()
        self.objects = {key: dict(vars(owner)) for key, owner in self.owners.items()}
        self.items = {name: held(one) for name, one in self.mappings.items()}
        self.meta_path = list(sys.meta_path)
        self.modules = set(sys.modules)
        self.compared = 0

    @staticmethod
    def _mappings() -> dict[str, Any]:
        from transformers.activations import ACT2FN
        from transformers.loss.loss_utils import LOSS_MAPPING
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return {
            "ACT2FN": ACT2FN,
            "LOSS_MAPPING": LOSS_MAPPING,
            "ROPE_INIT_FUNCTIONS": ROPE_INIT_FUNCTIONS,
            "ALL_ATTENTION_FUNCTIONS": ALL_ATTENTION_FUNCTIONS._global_mapping,
            "copyreg.dispatch_table": copyreg.dispatch_table,
        }

    def changed(self) -> list[tuple[Any, str, Any, Any]]:
        """(owner, name, what was there, what is there now) of all that is another object."""
        found = []
        for key, before in self.objects.items():
            owner = self.owners[key]
            now = vars(owner)
            self.compared += len(before)
            for name, value in before.items():
                if now.get(name) is not value and name not in KEPT_ANEW:
                    found.append((owner, name, value, now.get(name)))
            if len(now) != len(before):
                new = [n for n in now if n not in before and n not in KEPT_ANEW]
                found += [(owner, name, None, now[name]) for name in new]
        for name, items in self.items.items():
            current = held(self.mappings[name])
            self.compared += len(items)
            for item in {*items, *current}:
                if current.get(item) is not items.get(item):
                    mapping = self.mappings[name]
                    found.append((mapping, item, items.get(item), current.get(item)))
        return found

    def check_process(self) -> None:
        """No finder, no module and no kind of copying of ours is left in the process."""
        new = [type(one) for one in sys.meta_path if one not in self.meta_path]
        if new != ([ImportWatcher] if watching.active else []):
            raise Violation("leak", f"sys.meta_path has {sys.meta_path}, of {watching.active}")
        names = {name for name in set(sys.modules) - self.modules if "hf_kernel_patch" in name}
        names = {name for name in names if not name.startswith("hf_kernel_patch.")}
        if names:
            raise Violation("leak", f"sys.modules has {sorted(names)}")
        for kind in copy._deepcopy_dispatch:  # type: ignore[attr-defined]
            if ROOT in vars(kind) and kind not in known_subclasses():
                raise Violation("leak", f"copy's table has {kind}")


def held(mapping: Any) -> dict[Any, Any]:
    """The items, also of a mapping that makes what is asked of it."""
    return {key: dict.get(mapping, key) for key in mapping}


def known_subclasses() -> set[type]:
    """The subclasses that are kept to be used again."""
    return {kind for made in subclasses._made.values() for kind in made.values()}


def kept() -> dict[str, int]:
    """How much is remembered from what was once in force."""
    return {
        "functions": len(composing._made),
        "subclasses": len(known_subclasses()),
        "stacks": len(ledger._stacks),
        "records": len(records._records),
        "modules": len(modules._patched),
    }


def check_nothing_held(leaks: bool) -> None:
    """After ``unpatch()`` nothing is remembered as in force, and every site rests."""
    fine = ("functions", "subclasses") if leaks else ("functions", "subclasses", "stacks")
    left = {name: n for name, n in kept().items() if n and name not in fine}
    if left or watching.active or model_patch.applications:
        raise Violation("leak", f"after unpatch() {left} are left")
    for made in composing._made.values():
        for site in made.sites.values():
            if site.active or site.modules or site.counters:
                raise Violation("leak", f"a site of {made.original.__qualname__} is still active")


def in_force() -> dict[str, Any]:
    """All that a failed step has to leave as it was, comparable with ==."""
    sites = [site for made in composing._made.values() for site in made.sites.values()]
    # What belonged to models that are gone may be forgotten at any time.
    alive = [one for one in model_patch.applications if one.alive()]
    return {
        "activations": [id(one) for one in watching.active],
        "applications": [(id(one), len(one.holds())) for one in alive],
        "rows": [
            (id(row), row.outcome, row.reason, row.instances)
            for one in (*watching.active, *alive)
            for row in (one.rows if isinstance(one.rows, list) else one.rows.values())
        ],
        "entries": {
            key: [id(getattr(entry.value, "__func__", entry.value)) for entry in stack]
            for key, stack in ledger._stacks.items()
            if not stack[-1].slot.gone()
        },
        "records": {key: len(one.holders) for key, one in records._records.items()},
        "patched modules": {key: len(one.wishes) for key, one in modules._patched.items()},
        "active sites": {id(one): len(one.counters) for one in sites if one.active},
        "modules of sites": {id(one): sorted(one.modules) for one in sites if one.modules},
    }


def active(value: Any) -> bool:
    """Whether a value is a function of ours that some patch holds in force."""
    made = made_by_us(value)
    return made is not None and any(site.active for site in made.sites.values())
