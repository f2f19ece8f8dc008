"""Steps in which something inside of the package fails, and the imports that are made anew."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import traceback
from collections.abc import Iterator
from random import Random
from typing import Any

import hf_kernel_patch
from hf_kernel_patch.patching import global_patch, model_patch, modules, records
from hf_kernel_patch.patching.ledger import ledger
from hf_kernel_patch.recognition import composing
from tests.random_steps import snapshot, steps_models, steps_patch
from tests.random_steps.machine import Inapplicable, Machine
from tests.random_steps.worlds import LATE, REAL, Pair, Violation, plain, real
from tests.support.tiny import tiny_config


class Injected(RuntimeError):
    """What is raised inside of the package."""


#: Where the package calls itself: (owner, name).
INSIDE: tuple[tuple[Any, str], ...] = (
    (ledger, "push"),
    (ledger, "replace"),
    (records, "composed"),
    (modules, "composed"),
    (modules, "subclass"),
    (global_patch, "options_of"),
    (model_patch, "options_of"),
    (global_patch, "why_not"),
    (model_patch, "why_not"),
    (global_patch, "describe_source"),
    (model_patch, "source_hash"),
    (global_patch, "in_front"),
    (global_patch, "globals_holding"),
    (composing, "rewritten"),
)
#: What takes something back: also the patch that another one takes the place of.
ENDINGS = (global_patch.Activation.undo.__code__, model_patch.Application.release.__code__)
#: Steps that put something in force.
APPLYING = (
    steps_patch.patch,
    steps_patch.enter,
    steps_patch.apply_kernel,
    steps_patch.apply_default_kernels,
    steps_patch.callback_begins,
    steps_models.copied,
)


@contextlib.contextmanager
def failing(owner: Any, name: str, nth: int) -> Iterator[None]:
    """The ``nth`` call of a function raises, once; instances get the function of their own."""
    real, calls = getattr(owner, name), 0
    own = name in vars(owner)

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if not taking_back():
            calls += 1
            if calls == nth:
                raise Injected(f"call {nth} of {name}")
        return real(*args, **kwargs)

    setattr(owner, name, fails)
    try:
        yield
    finally:
        setattr(owner, name, real) if own else delattr(owner, name)


def taking_back() -> bool:
    """Whether what runs now is the end of a patch, which nobody promises to survive a failure."""
    return any(frame.f_code in ENDINGS for frame, _ in traceback.walk_stack(None))


def state(machine: Machine) -> dict[str, Any]:
    """All that a failed step leaves as it was."""
    found = snapshot.in_force()
    found["places"] = {place.label: id(place.read(REAL)) for place in machine.all_places()}
    found["instances"] = {
        (pair.name, name, attribute): id(getattr(value, "__func__", value))
        for pair in machine.pool
        for name, module in pair.model.named_modules()
        for attribute, value in [("class", type(module)), *vars(module).items()]
        if attribute in ("class", "forward", "_old_forward")
    }
    return found


def fault(machine: Machine, random: Random) -> str:
    """A step that applies something fails inside, and nothing is another than before."""
    if not machine.options.faults:
        raise Inapplicable
    owner, name = random.choice(INSIDE)
    step, nth = random.choice(APPLYING), random.randint(1, 6)
    what = f"call {nth} of {getattr(owner, '__name__', 'ledger').rpartition('.')[2]}.{name} fails"
    before = state(machine)
    pool = list(machine.pool)
    try:
        with failing(owner, name, nth):
            done = step(machine, random)
    except Injected:
        pass
    except Violation as error:
        if "Injected" not in str(error):
            raise
    else:
        return f"no fault ({what}): {done}"
    now = state(machine)
    wrong = [part for part in before if now[part] != before[part]]
    if wrong or [id(one) for one in machine.pool] != [id(one) for one in pool]:
        part = wrong[0] if wrong else "pool"
        raise Violation(
            f"fault in {step.__name__}", f"{what}: {part} was {difference(before[part], now[part])}"
        )
    return f"{what}, in {step.__name__}"


def difference(before: Any, now: Any) -> str:
    if isinstance(before, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys[:3])
    if len(before) != len(now):
        return f"{len(before)} -> {len(now)} long"
    pairs = [(one, other) for one, other in zip(before, now, strict=True) if one != other]
    return f"{len(pairs)} others: {pairs[:3]}"


def import_anew(machine: Machine, random: Random) -> str:
    """A modelling module is imported a second time, or reloaded, and is patched as it was."""
    if not machine.options.imports:
        raise Inapplicable
    module = real(LATE)
    where = module.__name__
    remember(machine, module)
    if reload := random.random() < 0.5:
        module = importlib.reload(module)
    else:
        del sys.modules[where]
        module = real(LATE)
    remember(machine, module)
    site = f"{where}.SmolLM3RMSNorm.forward"
    covered = [row for one in steps_patch.active() for row in one.rows if row.site == site]
    installed = snapshot.active(module.SmolLM3RMSNorm.forward)
    if installed != any(row.outcome == "patched" for row in covered):
        raise Violation("import", f"rows {covered}, but installed is {installed}")
    for row in hf_kernel_patch.status():
        if row.site.startswith(f"{where}.") and row.outcome == "patched" and row.scope == "global":
            value: Any = module
            for name in row.site.removeprefix(f"{where}.").split("."):
                value = getattr(value, name)
            if not snapshot.active(value):
                raise Violation("import", f"{row.site} says patched, {value} stands there")
    if len(machine.pool) < 5:
        machine.pool.append(late_pair(machine, module))
    return f"{'reload' if reload else 'import anew'} {where}"


def remember(machine: Machine, module: Any) -> None:
    """Keep what a module holds now, to see at the end that it holds nothing of ours."""
    classes = [one for one in vars(module).values() if isinstance(one, type)]
    known = {id(one) for one in machine.anew}
    mine = [module, *(one for one in classes if one.__module__ == module.__name__)]
    machine.anew += [one for one in mine if id(one) not in known]


def late_pair(machine: Machine, module: Any) -> Pair:
    """A model of the module as it is now, and its twin."""
    model = module.SmolLM3ForCausalLM(tiny_config(LATE))
    twin = plain(LATE).SmolLM3ForCausalLM(copy.deepcopy(model.config))
    twin.load_state_dict(model.state_dict())
    machine.made += 1
    return Pair(LATE, f"m{machine.made}", model.train(), twin.train())
