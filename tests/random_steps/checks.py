"""The invariants, each a function of the machine that raises Violation."""

from __future__ import annotations

from collections import Counter
from random import Random
from types import MethodType
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

import hf_kernel_patch
from hf_kernel_patch.patching import model_patch
from hf_kernel_patch.recognition.source import ROOT, made_by_us
from tests.random_steps.foreign import Place, chain
from tests.random_steps.snapshot import active
from tests.random_steps.worlds import (
    FAMILIES,
    PLAIN,
    REAL,
    Pair,
    Violation,
    calls,
    differences,
    evaluated,
    generated,
    in_world,
    outcome,
    training,
)

if TYPE_CHECKING:
    from tests.random_steps.machine import Machine


def places_hold_what_was_put_there(machine: Machine) -> None:
    """Every wrapper of the user is where the user put it, over the original at last."""
    for place in machine.all_places():
        tags, inside, ours = chain(place.read(REAL))
        if inside is not place.originals[REAL]:
            raise Violation("place", f"{place.label} ends in {inside!r}")
        if PLAIN in place.owners:
            expected = chain(place.read(PLAIN))[0]
            if tags != expected:
                raise Violation("place", f"{place.label}: {tags}, not {expected}")
        if machine.nothing_global():
            if ours and not place.over_ours:
                raise Violation("not restored", f"{place.label} still holds ours")
            if ours and active(place.read(REAL)):
                raise Violation("still active", f"{place.label} is served by no patch's kernel")
        if not ours:
            place.over_ours = False
            if machine.nothing_global() and not tags:
                place.written = False


def known_scopes(machine: Machine) -> None:
    """``status()`` has rows where something is in force, and none otherwise."""
    rows = hf_kernel_patch.status().rows
    expected = machine.standing or machine.blocks
    chosen = [block for block in machine.blocks if block._entered[-1].kernels]
    if machine.nothing_global() and chosen:
        raise Violation("status", "a block is open and nothing is in force")
    if any(row.scope == "global" for row in rows) and not expected:
        raise Violation("status", f"rows of {rows[0].site} with nothing in force")
    written = {place.label for place in machine.all_places() if place.written}
    for row in rows:
        if row.scope != "global" or row.outcome != "patched":
            continue
        place = by_site(machine, row.site)
        if place is None or (place.label in written and not machine.options.honest_now):
            continue
        if not active(place.read(REAL)):
            raise Violation("not installed", f"{row.site} says patched, {place.read(REAL)} stands")
        if machine.options.honest_now and place.name == "forward":
            for pair in machine.pool:
                for name, module in pair.model.named_modules():
                    if type(module) is place.owners[REAL] and bypasses(module):
                        raise Violation("honesty", f"{row.site} says patched, not {pair} {name}")
    if machine.options.honest_now:
        for row in rows:
            place = by_site(machine, row.site) if row.scope == "global" else None
            over = "was patched over by" in row.reason and place is not None
            if over and active(place.read(REAL)):
                raise Violation("honesty", f"{row.site}: {row.reason}, but ours stands there")


def bypasses(module: Any) -> bool:
    """Whether a module owns a forward that is not the class's, which is ours, bound to it."""
    own = vars(module)
    value = own.get("_old_forward", own.get("forward"))
    bound = isinstance(value, MethodType) and value.__self__ is module
    return value is not None and not (bound and active(value.__func__))


def unreached(model: Any) -> list[str]:
    """The methods of modules patched alone whose class has other wrappers now than it had then."""
    found = []
    for name, module in model.named_modules():
        own = vars(type(module))
        for method in [one for one in own if ROOT in own and made_by_us(own[one])]:
            if chain(own[method])[0] != chain(getattr(own[ROOT], method))[0]:
                found.append(f"{name}.{method}")
    return found


def later_wrappers_are_told(machine: Machine) -> None:
    """The row of a model patched alone says where its class was wrapped later, and only there."""
    hf_kernel_patch.status()
    for application in model_patch.applications:
        truth: dict[int, tuple[Any, bool]] = {}
        for one in application.modules:
            if (module := one.module) is None:
                continue
            methods = {name.rpartition(".")[2] for name in unreached_here(module)}
            for wish in one.wishes:
                if wish.application is application:
                    row, so_far = truth.get(id(wish.row), (wish.row, False))
                    truth[id(wish.row)] = row, so_far or wish.method in methods
        for row, later in truth.values():
            told = "does not reach this model" in row.reason
            if row.outcome == "patched" and told != later:
                raise Violation("reach", f"{row.site} says {row.reason!r}; wrapped later: {later}")


def unreached_here(module: Any) -> list[str]:
    """As ``unreached``, of a module itself."""
    return [name for name in unreached(module) if name.startswith(".")]


def by_site(machine: Machine, site: str) -> Place | None:
    """The watched place of a row."""
    for place in (*machine.places["method"], *machine.places["function"]):
        owner: Any = place.owners[REAL]
        if isinstance(owner, type):
            if site == f"{owner.__module__}.{owner.__qualname__}.{place.name}":
                return place
        elif site == f"{owner.__name__}.{place.name}":
            return place
    return None


def nothing_else_is_changed(machine: Machine) -> None:
    """Of all objects only those of the tables and of the user are others, and ours lead back."""
    ours = {row.site for row in hf_kernel_patch.status() if row.scope == "global"}
    by_key = {(id(p.owners[REAL]), p.name): p for p in machine.all_places()}
    by_key |= {(id(p.owners[PLAIN]), p.name): p for p in machine.all_places() if PLAIN in p.owners}
    watched = None if machine.nothing_global() else (PreTrainedModel, "__init__")
    for owner, name, before, now in machine.snapshot.changed():
        if (id(owner), name) in by_key:
            continue
        if (owner, name) == watched and now.__wrapped__ is before:
            continue
        made = made_by_us(now)
        where = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", "")
        if made is not None and made.original is (before or inherited(owner, name)):
            site = f"{getattr(owner, '__module__', None) or where}.{where}.{name}"
            if ours and (f"{where}.{name}" in ours or site in ours or not isinstance(owner, type)):
                continue
        raise Violation("changed", f"{where}.{name} is {now!r}, was {before!r}")


def inherited(owner: Any, name: str) -> Any:
    """What a class has of its bases."""
    found = (vars(base)[name] for base in owner.__mro__[1:] if name in vars(base))
    return next(found, None) if isinstance(owner, type) else None


def instances(machine: Machine) -> None:
    """Modules have what their twins have, and classes of ours only where a patch is in force."""
    none = not any(one.alive() for one in model_patch.applications)
    for pair in machine.pool:
        twins = dict(pair.twin.named_modules())
        modules = dict(pair.model.named_modules())
        if modules.keys() != twins.keys():
            raise Violation("modules", f"{pair}: {sorted(modules.keys() ^ twins.keys())[:5]}")
        for name, module in modules.items():
            kind, twin = type(module), twins[name]
            if none and ROOT in vars(kind):
                raise Violation("class left", f"{pair} {name} has the class of a patch")
            if kind.__qualname__ != type(twin).__qualname__:
                raise Violation("class", f"{pair} {name} is a {kind}")
            mine, other = set(vars(module)), set(vars(twin))
            if mine != other:
                raise Violation("attributes", f"{pair} {name}: {sorted(mine ^ other)}")
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                if len(vars(module)[hooks]) != len(vars(twin)[hooks]):
                    raise Violation("hooks", f"{pair} {name}.{hooks}")
            if not pair.touched and machine.nothing():
                for attribute in ("forward", "_old_forward"):
                    if attribute in vars(module):
                        raise Violation("attributes", f"{pair} {name} owns {attribute}")


#: How a model is run, with how many of twenty checks.
RUNS = (*[training] * 14, *[evaluated] * 4, *[generated] * 2)


def results(machine: Machine, pair: Pair, random: Random, run: Any = None) -> None:
    """Results, errors and calls of the user's functions are the twin's."""
    run = run or random.choice(RUNS)
    seed, read = random.randrange(1000), random.random() < 0.3
    for counter in calls.values():
        counter.clear()
    before = Counter({id(row): row.calls.total() for row in hf_kernel_patch.status()})
    if run is not training:
        was = pair.model.training
        for _, model in pair.both():
            model.eval()
    found, error = in_world(REAL, lambda: outcome(lambda: run(pair.model, seed, read)))
    truth, other = in_world(PLAIN, lambda: outcome(lambda: run(pair.twin, seed, read)))
    if run is not training:
        for _, model in pair.both():
            model.train(was)
    machine.checks += 1
    if error.partition(":")[0] != other.partition(":")[0]:
        raise Violation("error", f"{run.__name__} of {pair}: {error!r}, not {other!r}")
    if unreached(pair.model):
        return  # which its rows say
    if calls[REAL] != calls[PLAIN]:
        tags = {tag for one in calls.values() for tag in one}
        wrong = {
            tag: (calls[REAL][tag], calls[PLAIN][tag])
            for tag in sorted(tags)
            if calls[REAL][tag] != calls[PLAIN][tag]
        }
        raise Violation("calls", f"{run.__name__} of {pair}: (real, plain) {wrong}")
    if not error and (wrong := differences(found, truth)):
        raise Violation("results", f"{run.__name__} of {pair}: {'; '.join(wrong[:3])}")
    if machine.counting and run is training and pair.model.training and not error:
        counted(machine, pair, before)


def counted(machine: Machine, pair: Pair, before: Counter[int]) -> None:
    """What says that it is patched was served, or says why not."""
    own = any("forward" in vars(module) for module in pair.model.modules())
    if pair.family not in FAMILIES or own or (pair.touched and not machine.options.honest_now):
        return
    mine = {id(module) for module in pair.model.modules()}
    rows = [row for row in hf_kernel_patch.status() if row.scope == "global"]
    for application in model_patch.applications:
        alive = [one for one in application.modules if one.module is not None]
        wishes = [wish for one in alive if one._key in mine for wish in one.wishes]
        rows += {id(w.row): w.row for w in wishes if w.application is application}.values()
    sites: dict[str, int] = {}
    skipped = {
        row.site for row in rows if row.outcome != "patched" or row.site.endswith("_for_decode")
    }
    # A row is shadowed by one model's module while others are served.
    known = [row for row in rows if row.outcome in ("patched", "shadowed")]
    ops = {row.op for row in known if row.architecture == pair.family}
    for row in rows:
        if row.architecture == pair.family and row.site not in skipped:
            if row.op == "rope" and "qk_norm_rope" in ops:
                continue
            sites[row.site] = sites.get(row.site, 0) + row.calls.total() - before[id(row)]
    for site, count in sites.items():
        place = by_site(machine, site)
        hidden = place is not None and place.written and not machine.options.honest_now
        if not count and not hidden:
            raise Violation("honesty", f"{site} says patched; {pair} trained and nothing counted")
