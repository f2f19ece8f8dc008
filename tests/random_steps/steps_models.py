"""Steps of a user with models: building, copying, sharing, loading, modes, threads."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
from random import Random
from typing import Any

import torch

import hf_kernel_patch
from tests.random_steps.checks import unreached
from tests.random_steps.machine import Inapplicable, Machine
from tests.random_steps.worlds import (
    FAMILIES,
    PLAIN,
    REAL,
    Pair,
    Violation,
    calls,
    differences,
    evaluated,
    in_world,
    outcome,
)


def build(machine: Machine, random: Random) -> str:
    if len(machine.pool) >= 5:
        raise Inapplicable
    return f"build {machine.new(random.choice(FAMILIES))}"


def delete(machine: Machine, random: Random) -> str:
    if len(machine.pool) < 2:
        raise Inapplicable
    pair = machine.pool.pop(random.randrange(len(machine.pool)))
    name = str(pair)
    machine.callbacks = [one for one in machine.callbacks if one[1] is not pair]
    machine.undoes = [one for one in machine.undoes if one[0] is not pair]
    del pair
    if collect := random.random() < 0.5:
        gc.collect()
    return f"del {name}{'; gc.collect()' if collect else ''}"


COPIES: dict[str, Any] = {
    "copy.deepcopy": copy.deepcopy,
    "copy.copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def ways(pair: Pair) -> list[str]:
    """How a pair can be copied: not by a pickle where that needs what is installed now.

    Attention that keeps the rotary function keeps ours. A class whose module was imported anew is
    no longer what its name stands for.
    """
    kept = any(hasattr(module, "rotary_fn") for module in pair.twin.modules())
    pickles = pair.family in FAMILIES and not kept
    return [how for how in sorted(COPIES) if how != "pickle" or pickles]


def copied(machine: Machine, random: Random) -> str:
    """A copy of a whole model joins the pool, in the place of another where there are many."""
    pair = machine.pick(random)
    how = random.choice(ways(pair))
    model, error = outcome(lambda: in_world(REAL, lambda: COPIES[how](pair.model)))
    twin, other = outcome(lambda: in_world(PLAIN, lambda: COPIES[how](pair.twin)))
    if error.partition(":")[0] != other.partition(":")[0]:
        raise Violation("copy", f"{how} of {pair}: {error!r}, not {other!r}")
    if error:
        return f"{how}({pair}) raises {error.partition(':')[0]}"
    machine.made += 1
    made = Pair(pair.family, f"m{machine.made}", model, twin)
    made.touched = pair.touched or how == "copy.copy"
    if how == "copy.copy":
        pair.touched = True  # they have the same children
    if len(machine.pool) >= 5:
        delete(machine, random)
    machine.pool.append(made)
    return f"{made} = {how}({pair})"


def copied_module(machine: Machine, random: Random) -> str:
    """A copy of a module takes the module's place."""
    pair = machine.pick(random)
    how = random.choice(ways(pair))
    path = random.choice([name for name, _ in pair.model.named_modules() if name])
    made = {}
    for world, model in pair.both():
        module = model.get_submodule(path)
        made[world] = in_world(world, lambda one=module: outcome(lambda: COPIES[how](one)))
    kinds = {world: error.partition(":")[0] for world, (_, error) in made.items()}
    if kinds[REAL] != kinds[PLAIN]:
        raise Violation("copy", f"{how} of {path} of {pair}: {made}")
    if kinds[REAL]:
        return f"{how}({pair}.{path}) raises {kinds[REAL]}"
    for world, model in pair.both():
        model.set_submodule(path, made[world][0])
    pair.touched = True
    return f"{pair}.{path} = {how}({pair}.{path})"


def share(machine: Machine, random: Random) -> str:
    """A module of one model becomes another's, too."""
    one = machine.pick(random)
    other = machine.pick(random, one.family)
    if one is other:
        raise Inapplicable
    path = random.choice(["model", "model.layers.0", "model.norm", "model.layers.1.mlp", "lm_head"])
    for (_, source), (_, target) in zip(one.both(), other.both(), strict=True):
        target.set_submodule(path, source.get_submodule(path))
    one.touched = other.touched = True
    return f"{other}.{path} = {one}.{path}"


def load(machine: Machine, random: Random) -> str:
    """Other weights, by way of a state_dict."""
    pair = machine.pick(random)
    state = pair.model.state_dict()
    if list(state) != list(pair.twin.state_dict()):
        raise Violation("state_dict", f"{pair} has other keys than its twin")
    generator = torch.Generator().manual_seed(random.randrange(100))
    moved = {
        name: value + 0.01 * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }
    for _, model in pair.both():
        model.load_state_dict(moved)
    return f"{pair}.load_state_dict(moved)"


def mode(machine: Machine, random: Random) -> str:
    pair, training = machine.pick(random), random.random() < 0.8
    for _, model in pair.both():
        model.train(training)
    return f"{pair}.train({training})"


def checkpointing(machine: Machine, random: Random) -> str:
    pair, on = machine.pick(random), random.random() < 0.5
    for _, model in pair.both():
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
    return f"{pair}.gradient_checkpointing_{'enable' if on else 'disable'}()"


def attention(machine: Machine, random: Random) -> str:
    pair = machine.pick(random)
    kind = "eager" if pair.family == "gemma2" else random.choice(["eager", "sdpa"])
    for _, model in pair.both():
        model.set_attn_implementation(kind)
    return f"{pair}.set_attn_implementation({kind!r})"


def threads(machine: Machine, random: Random) -> str:
    """Forwards in threads, while the main one patches and takes back."""
    pair = machine.pick(random)
    seeds = [random.randrange(1000) for _ in range(random.choice([2, 3]))]
    for counter in calls.values():
        counter.clear()
    was = pair.model.training
    for _, model in pair.both():
        model.eval()
    found: dict[int, Any] = {}
    start = threading.Barrier(len(seeds) + 1)

    def run(seed: int) -> None:
        start.wait()
        found[seed] = outcome(lambda: evaluated(pair.model, seed))

    workers = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
    for worker in workers:
        worker.start()
    start.wait()
    names = random.choice(["rms_norm,swiglu", "rope,qk_norm_rope", "add_rms_norm,rms_norm"])
    block = hf_kernel_patch.patched(names, models=[pair.family], backend="torch")
    block.__enter__()
    with contextlib.suppress(hf_kernel_patch.ForeignPatchError):
        block.__exit__(None, None, None)
    for worker in workers:
        worker.join()
    for seed in seeds:
        truth, other = in_world(PLAIN, lambda s=seed: outcome(lambda: evaluated(pair.twin, s)))
        mine, error = found[seed]
        if error.partition(":")[0] != other.partition(":")[0]:
            raise Violation("threads", f"{pair}: {error!r}, not {other!r}")
        if not error and not unreached(pair.model) and (wrong := differences(mine, truth)):
            raise Violation("threads", f"{pair}: {wrong}")
    for _, model in pair.both():
        model.train(was)
    return f"threads: {len(seeds)} forwards of {pair} while patched({names!r}) comes and goes"
