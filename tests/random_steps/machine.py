"""The state that the steps change, as the harness itself knows it, and what is checked of it."""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

import hf_kernel_patch
from hf_kernel_patch.patching import model_patch, watching
from hf_kernel_patch.patching.ledger import ledger
from hf_kernel_patch.recognition.source import ROOT, made_by_us
from hf_kernel_patch.registry import ops
from tests.random_steps import checks
from tests.random_steps.foreign import Foreign, Place, places
from tests.random_steps.snapshot import Snapshot, check_nothing_held
from tests.random_steps.worlds import (
    FAMILIES,
    LATE,
    Pair,
    Violation,
    calls,
    evaluated,
    new_pair,
    real,
    training,
)


class Inapplicable(Exception):
    """A step has nothing to work on now."""


@dataclass
class Options:
    """What the package is asked to keep. Off is what it does not promise."""

    #: The honesty of rows is asked at the moment of ``status()``.
    honest_now: bool = True
    #: Modules are imported anew and reloaded while a patch is in force.
    imports: bool = True
    #: A class's forward is replaced while single models of it are patched, whose rows say so.
    class_over_model: bool = True
    #: A forward that somebody keeps still checkpoints when its patch has ended.
    kept_forwards: bool = True
    #: A layer whose forward somebody has wrapped, and which is patched then, still checkpoints.
    wrapped_layers: bool = True
    #: Nothing is remembered of a copy that is gone when its model is given back.
    leaks: bool = True
    #: A step that fails inside leaves also the sites' own bookkeeping as it was.
    faults: bool = True
    #: Wrappers over what all code shares: torch's functions, activations, ``nn.Linear``.
    deep: bool = False
    #: Steps by name that are left out.
    without: frozenset[str] = frozenset()


@dataclass
class Machine:
    """Models with their twins, what is in force, and what somebody else has put in place."""

    options: Options = field(default_factory=Options)
    pool: list[Pair] = field(default_factory=list)
    standing: bool = False
    #: ``patched`` blocks entered and not left.
    blocks: list[Any] = field(default_factory=list)
    #: Callbacks of the Trainer that have begun, each with its pair.
    callbacks: list[tuple[Any, Pair]] = field(default_factory=list)
    foreign: list[Foreign] = field(default_factory=list)
    #: Undoes of forward hooks and instance forwards.
    undoes: list[Any] = field(default_factory=list)
    #: What a module that was imported anew has ever held: itself, and its classes.
    anew: list[Any] = field(default_factory=list)
    counting: bool = False
    made: int = 0
    checks: int = 0

    def __post_init__(self) -> None:
        for family in FAMILIES:  # what transformers makes at first use is made
            pair = new_pair(family, "warm")
            for model in (pair.model, pair.twin):
                model.set_attn_implementation("eager")
                training(model, 0, True)
                evaluated(model, 0)
        del pair, model
        hf_kernel_patch.KernelPatchCallback()  # imports the Trainer's, and a modelling module
        self.late = real(LATE)
        self.late_before = dict(vars(self.late))
        self.places = places()
        self.snapshot = Snapshot()
        with hf_kernel_patch.patched(",".join(sorted(ops())), backend="torch"):
            pass  # what is parsed once is parsed
        # ``status()`` asks who refers to a class; all that is there now need not be looked at.
        gc.collect()
        gc.freeze()

    # -- what the steps use

    def tag(self) -> str:
        """A new name for something that somebody else puts in place."""
        self.made += 1
        return f"f{self.made}"

    def new(self, family: str) -> Pair:
        self.made += 1
        pair = new_pair(family, f"m{self.made}")
        self.pool.append(pair)
        return pair

    def pick(self, random: Random, family: str | None = None) -> Pair:
        """A pair of the pool; Inapplicable where there is none."""
        found = [one for one in self.pool if family in (None, one.family)]
        if not found:
            raise Inapplicable
        return random.choice(found)

    def all_places(self) -> list[Place]:
        return [place for some in self.places.values() for place in some]

    def nothing_global(self) -> bool:
        return not watching.active

    def nothing(self) -> bool:
        """Whether nothing of ours is in force anywhere."""
        return self.nothing_global() and not self.single_models()

    def single_models(self) -> bool:
        """Whether some model is patched alone."""
        return any(one.alive() for one in model_patch.applications)

    # -- what is checked

    def check(self, random: Random, thorough: bool) -> None:
        """After a step: the cheap checks, and now and then all of them."""
        checks.places_hold_what_was_put_there(self)
        checks.known_scopes(self)
        checks.later_wrappers_are_told(self)
        if thorough or self.nothing():
            checks.nothing_else_is_changed(self)
        checks.instances(self)
        if self.pool:
            pair = random.choice(self.pool)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checks.results(self, pair, random)
        if thorough:
            self.snapshot.check_process()

    def close(self) -> None:
        """Everybody takes back what they did; then every object has to be the one it was."""
        self.blocks.clear()
        self.callbacks.clear()
        with contextlib.suppress(hf_kernel_patch.ForeignPatchError):
            hf_kernel_patch.unpatch()
        self.standing = self.counting = False
        hf_kernel_patch.count_calls(False)
        hf_kernel_patch.capture_decoding(True)
        check_nothing_held(self.options.leaks)
        if not self.options.leaks:
            ledger._stacks.clear()
        for one in self.foreign:
            for world in one.place.owners:
                one.place.write(world, one.place.originals[world])
        self.foreign.clear()
        for place in self.all_places():
            if place.over_ours or place.written:
                for world, value in place.originals.items():
                    place.write(world, value)
        if changed := self.snapshot.changed():
            raise Violation("not restored", describe(changed))
        self.snapshot.check_process()
        for owner in self.anew:
            if left := [name for name, value in vars(owner).items() if made_by_us(value)]:
                raise Violation("not restored", f"{owner} holds ours in {left}")
        self.anew.clear()
        vars(self.late).update(self.late_before)
        name = self.late.__name__
        sys.modules[name] = self.late
        setattr(sys.modules[self.late.__package__], name.rpartition(".")[2], self.late)
        for pair in self.pool:
            for name, module in pair.model.named_modules():
                if ROOT in vars(type(module)):
                    raise Violation("class left", f"{pair} {name} has still the class of a patch")
        self.pool.clear()
        self.undoes.clear()
        for counter in calls.values():
            counter.clear()
        torch.nn.modules.module._global_forward_hooks.clear()
        gc.collect()


def describe(changed: list[tuple[Any, str, Any, Any]]) -> str:
    """A few of the changes."""
    return "; ".join(
        f"{getattr(owner, '__qualname__', getattr(owner, '__name__', type(owner)))}.{name} is "
        f"{now!r} in the place of {before!r}"[:400]
        for owner, name, before, now in changed[:4]
    )
