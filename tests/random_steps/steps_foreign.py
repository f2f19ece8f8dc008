"""Steps of somebody else: wrappers, replaced helpers, hooks, forwards that instances own."""

from __future__ import annotations

from random import Random
from types import MethodType
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module

from tests.random_steps import checks
from tests.random_steps.foreign import Foreign, ForwardHook, Hook, wrapper
from tests.random_steps.machine import Inapplicable, Machine
from tests.random_steps.worlds import Pair, called

FACTORS = (1.0, 1.0, 0.75, 1.25)


def replace(machine: Machine, random: Random) -> str:
    """A wrapper over a class's method, a function or an item of a registry."""
    kinds = ["method", "function", "shared", *(["deep"] if machine.options.deep else [])]
    place = random.choice(machine.places[random.choice(kinds)])
    if place.name == "forward" and machine.single_models() and not machine.options.class_over_model:
        raise Inapplicable
    plain = place.label.endswith(("Model.forward", "ForCausalLM.forward", "Layer.forward"))
    factor = 1.0 if plain else random.choice(FACTORS)
    tag = machine.tag()
    machine.foreign.append(Foreign(place, tag, factor))
    return f"{tag}: wrap {place.label}, times {factor}"


def take_back(machine: Machine, random: Random) -> str:
    """A wrapper leaves: mostly where it is the outermost, else with what is over it."""
    if not machine.foreign:
        raise Inapplicable
    on_top = [one for one in machine.foreign if one.on_top()]
    chosen = random.choice(on_top if on_top and random.random() < 0.8 else machine.foreign)
    chosen.remove()
    machine.foreign.remove(chosen)
    return f"{chosen.tag} leaves {chosen.place.label}"


def reset(machine: Machine, random: Random) -> str:
    """Somebody puts the originals back where wrappers are, ours or not."""
    if not machine.foreign:
        raise Inapplicable
    place = random.choice(machine.foreign).place
    for world, value in place.originals.items():
        place.write(world, value)
    place.written = True
    machine.foreign = [one for one in machine.foreign if one.place is not place]
    return f"reset {place.label}"


def somewhere(machine: Machine, random: Random) -> tuple[Pair, str]:
    """A pair, and a module by name that is worth touching."""
    pair = machine.pick(random)
    names = [
        name
        for name, module in pair.model.named_modules()
        if name.endswith(("norm", "mlp", "act_fn", "self_attn", "lm_head", "experts", "proj"))
        or name in ("model", "model.layers.0")
    ]
    if keeps_forwards_apart(machine):
        names.remove("model.layers.0")
    return pair, random.choice(names)


def keeps_forwards_apart(machine: Machine) -> bool:
    """Whether nobody may get hold of a layer's forward while it is ours."""
    return not machine.options.kept_forwards and not machine.nothing()


def factor_for(name: str, random: Random) -> float:
    return 1.0 if name in ("model", "model.layers.0") else random.choice(FACTORS)


def hook(machine: Machine, random: Random) -> str:
    """A forward hook, or one that comes before; or one that every module has."""
    pair, name = somewhere(machine, random)
    tag, factor = machine.tag(), factor_for(name, random)
    handles = []
    for _, model in pair.both():
        module = model.get_submodule(name)
        handles.append(module.register_forward_hook(ForwardHook(tag, factor)))
    pair.touched = True
    machine.undoes.append((pair, tag, handles))
    return f"{tag}: {pair}.{name}.register_forward_hook, times {factor}"


def unhook(machine: Machine, random: Random) -> str:
    if not machine.undoes:
        raise Inapplicable
    pair, tag, handles = machine.undoes.pop(random.randrange(len(machine.undoes)))
    for handle in handles:
        handle.remove()
    return f"{tag} is removed from {pair}"


def hook_of_all(machine: Machine, random: Random) -> str:
    """A hook on every module's forward, for the length of one check."""
    tag = machine.tag()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: called(f"{tag} {type(module).__qualname__}")
    )
    machine.checks += 1
    try:
        checks.results(machine, machine.pick(random), random)
    finally:
        handle.remove()
    return f"{tag}: a forward hook of all modules, for one check"


def accelerate_hook(machine: Machine, random: Random) -> str:
    pair, name = somewhere(machine, random)
    tag, factor = machine.tag(), factor_for(name, random)
    append = random.random() < 0.3
    everywhere = random.random() < 0.2 and not keeps_forwards_apart(machine)
    for _, model in pair.both():
        modules = model.modules() if everywhere else [model.get_submodule(name)]
        for module in list(modules):
            add_hook_to_module(module, Hook(tag, 1.0 if everywhere else factor), append=append)
    pair.touched = True
    where = f"every module of {pair}" if everywhere else f"{pair}.{name}"
    return f"{tag}: add_hook_to_module({where}, append={append}), times {factor}"


def remove_accelerate_hook(machine: Machine, random: Random) -> str:
    pair = machine.pick(random)
    names = [n for n, module in pair.model.named_modules() if hasattr(module, "_hf_hook")]
    if not names:
        raise Inapplicable
    name, recurse = random.choice(names), random.random() < 0.3
    for _, model in pair.both():
        if recurse:
            remove_hook_from_module(model, recurse=True)
        else:
            remove_hook_from_module(model.get_submodule(name))
    return f"remove_hook_from_module({pair if recurse else f'{pair}.{name}'})"


def own_over_bound(module: Any, tag: str, factor: float) -> Any:
    return wrapper(module.forward, tag, factor)


def own_as_it_is(module: Any, tag: str, factor: float) -> Any:
    return module.forward


def own_by_class(module: Any, tag: str, factor: float) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        called(tag)
        return type(self).forward(self, *args, **kwargs)

    return MethodType(forward, module)


def own_method(module: Any, tag: str, factor: float) -> Any:
    return MethodType(wrapper(type(module).forward, tag, factor), module)


OWN = (own_over_bound, own_as_it_is, own_by_class, own_method)


def own_forward(machine: Machine, random: Random) -> str:
    """An instance gets a forward of its own."""
    pair, name = somewhere(machine, random)
    tag, make, factor = machine.tag(), random.choice(OWN), factor_for(name, random)
    holds = make in (own_over_bound, own_method)  # the class's forward of now
    if name == "model.layers.0" and holds and not machine.options.wrapped_layers:
        raise Inapplicable
    for _, model in pair.both():
        module = model.get_submodule(name)
        module.forward = make(module, tag, factor)
    pair.touched = True
    return f"{tag}: {pair}.{name}.forward = {make.__name__}, times {factor}"


def no_own_forward(machine: Machine, random: Random) -> str:
    """Somebody deletes the forward that an instance owns, where no hook needs it."""
    pair = machine.pick(random)
    names = [
        name
        for name, module in pair.model.named_modules()
        if "forward" in vars(module) and not hasattr(module, "_hf_hook")
    ]
    if not names:
        raise Inapplicable
    name = random.choice(names)
    for _, model in pair.both():
        del model.get_submodule(name).forward
    return f"del {pair}.{name}.forward"
