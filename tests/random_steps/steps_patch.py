"""Steps that put kernels in force and take them back."""

from __future__ import annotations

from random import Random
from typing import Any

import hf_kernel_patch
from hf_kernel_patch import ForeignPatchError, api
from hf_kernel_patch.patching import model_patch, watching
from hf_kernel_patch.patching.choosing import activation_of, select
from hf_kernel_patch.recognition.source import ROOT, made_by_us
from tests.random_steps.foreign import Place
from tests.random_steps.machine import Inapplicable, Machine
from tests.random_steps.snapshot import check_nothing_held
from tests.random_steps.worlds import FAMILIES, REAL, Pair, Violation
from tests.support.scope import LAYERS, LOSS, MOE, NORM, ROPE, SWIGLU

OPS = ("rms_norm", "rope", "swiglu", "add_rms_norm", "qk_norm_rope", "moe", "linear_cross_entropy")
#: Patterns of sites that every family has.
SITES = ("*RMSNorm.forward", "*.apply_rotary_pos_emb", "*DecoderLayer.forward", "transformers.*")
IDS = (NORM, ROPE, SWIGLU, MOE, LOSS, "torch_fused_add_rmsnorm", "torch_fused_qk_norm_rope")


def arguments(random: Random) -> dict[str, Any]:
    """Of ``patch_transformers`` and ``patched``, at random."""
    include = random.choice(
        [
            list(OPS),
            list(OPS),
            random.sample(OPS, random.randint(1, 4)),
            random.sample(IDS, random.randint(1, 4)),
            LAYERS,
        ]
    )
    chosen: dict[str, Any] = {"include": include, "backend": "torch"}
    if random.random() < 0.2:
        chosen["exclude"] = random.choice((*OPS, *SITES))
    if random.random() < 0.7:
        chosen["models"] = random.sample(FAMILIES, random.randint(1, 3))
    if random.random() < 0.3:
        chosen["options"] = {"linear_cross_entropy": loss_options(random)}
    return chosen


def loss_options(random: Random) -> dict[str, Any]:
    """Options of the loss that leave its value as it is."""
    every = {"exact": True, "return_logits": True, "metrics": True, "memory_mib": 1}
    return {name: every[name] for name in random.sample(sorted(every), random.randint(0, 2))}


def told(chosen: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in chosen.items())


def patched_sites(activations: Any) -> set[str]:
    return {
        row.site
        for one in activations
        for row in one.rows
        if row.outcome in ("patched", "shadowed")
    }


def expected_labels(machine: Machine, ended: list[Any], kept: list[Any]) -> set[str]:
    """Labels of watched places that the end of activations has to name, and no other."""
    gone = patched_sites(ended) - patched_sites(kept)
    return {
        label(place)
        for place in (*machine.places["method"], *machine.places["function"])
        if site(place) in gone
        if made_by_us(now := place.read(REAL)) is None and now is not place.originals[REAL]
    }


def label(place: Place) -> str:
    owner: Any = place.owners[REAL]
    return f"{getattr(owner, '__qualname__', None) or owner.__name__}.{place.name}"


def site(place: Place) -> str:
    owner: Any = place.owners[REAL]
    where = (
        f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
    )
    return f"{where}.{place.name}"


def ending(machine: Machine, ended: list[Any], kept: list[Any], do: Any) -> str:
    """Do what ends activations, and compare what ForeignPatchError names, if it comes."""
    expected, error = expected_labels(machine, ended, kept), ""
    try:
        do()
    except ForeignPatchError as raised:
        error = str(raised)
    found = {part.partition(" (now ")[0] for part in error.partition(": ")[2].split("; ") if part}
    found = {one for one in found if " instance." not in one}
    if found != expected:
        raise Violation("names", f"ForeignPatchError names {found}, not {expected}: {error!r}")
    return " ForeignPatchError" if error else ""


def active() -> list[Any]:
    return list(watching.active)


def patch(machine: Machine, random: Random) -> str:
    chosen = arguments(random)
    old = [api._standing] if api._standing is not None else []
    before = active()
    wanted = api.settings.resolve(None, **chosen)
    same = bool(old) and api._same(old[0], activation_of(wanted, select(wanted)))
    if same:
        hf_kernel_patch.patch_transformers(**chosen)
        if active() != before:
            raise Violation("twice", "an equal call has changed what is in force")
        return f"patch_transformers({told(chosen)}) again"
    try:
        hf_kernel_patch.patch_transformers(**chosen)
        said = ""
    except ForeignPatchError:
        if not old:
            raise
        said = " ForeignPatchError"
    machine.standing = True
    return f"patch_transformers({told(chosen)}){said}"


def unpatch(machine: Machine, random: Random) -> str:
    def do() -> None:
        hf_kernel_patch.unpatch()

    said = ending(machine, active(), [], do)
    machine.standing = False
    machine.blocks.clear()
    machine.callbacks.clear()
    if hf_kernel_patch.status().rows:
        raise Violation("status", "rows after unpatch()")
    check_nothing_held(machine.options.leaks)
    return f"unpatch(){said}"


def enter(machine: Machine, random: Random) -> str:
    if len(machine.blocks) >= 4:
        raise Inapplicable
    chosen = arguments(random)
    block = hf_kernel_patch.patched(**chosen)
    block.__enter__()
    machine.blocks.append(block)
    return f"patched({told(chosen)}).__enter__()"


def leave(machine: Machine, random: Random) -> str:
    if not machine.blocks:
        raise Inapplicable
    place = random.randrange(len(machine.blocks))
    block = machine.blocks[place]
    ended = [block._entered[-1]]
    kept = [one for one in active() if one is not ended[0]]
    said = ending(machine, ended, kept, lambda: block.__exit__(None, None, None))
    machine.blocks.pop(place)
    return f"blocks[{place}].__exit__(){said}"


def apply_kernel(machine: Machine, random: Random) -> str:
    pair, kernel = machine.pick(random), random.choice(IDS)
    options = loss_options(random) if kernel == LOSS else None
    hf_kernel_patch.apply_kernel(kernel, model=pair.model, options=options)
    return f"apply_kernel({kernel!r}, model={pair}, options={options})"


def apply_default_kernels(machine: Machine, random: Random) -> str:
    pair = machine.pick(random)
    include = random.choice([list(IDS), random.sample(IDS, 3), LAYERS])
    hf_kernel_patch.apply_default_kernels(pair.model, include)
    return f"apply_default_kernels({pair}, {include!r})"


def unpatch_model(machine: Machine, random: Random) -> str:
    pair = machine.pick(random)
    try:
        hf_kernel_patch.unpatch(pair.model)
        said = ""
    except ForeignPatchError as error:
        said = " ForeignPatchError"
        if " instance." not in str(error):
            raise Violation("names", str(error)) from error
        if not pair.touched:
            raise Violation("names", f"{pair} is untouched: {error}") from error
    kept = elsewhere(pair)
    for name, module in pair.model.named_modules():
        if ROOT in vars(type(module)) and id(module) not in kept:
            raise Violation("class left", f"unpatch({pair}) leaves {name}")
    return f"unpatch({pair}){said}"


def elsewhere(pair: Pair) -> set[int]:
    """Modules that another patched model has too."""
    return {
        id(module)
        for one in model_patch.applications
        if one.model() is not None and one.model() is not pair.model
        for module in one.model().modules()
    }


def callback_begins(machine: Machine, random: Random) -> str:
    pair = machine.pick(random)
    if len(machine.callbacks) >= 2:
        raise Inapplicable
    include = random.choice([list(IDS), LAYERS])
    callback = hf_kernel_patch.KernelPatchCallback(include)
    event = random.choice([callback.on_init_end, callback.on_train_begin])
    event(None, None, None, model=pair.model)
    machine.callbacks.append((callback, pair))
    return f"KernelPatchCallback({include!r}).{event.__name__}(model={pair})"


def callback_ends(machine: Machine, random: Random) -> str:
    if not machine.callbacks:
        raise Inapplicable
    callback, pair = machine.callbacks.pop(random.randrange(len(machine.callbacks)))
    try:
        callback.on_train_end(None, None, None, model=pair.model)
    except ForeignPatchError:
        if not pair.touched:
            raise
    return f"callback of {pair}.on_train_end()"


def count(machine: Machine, random: Random) -> str:
    machine.counting = random.random() < 0.7
    hf_kernel_patch.count_calls(machine.counting)
    return f"count_calls({machine.counting})"


def capture(machine: Machine, random: Random) -> str:
    on = random.random() < 0.5
    hf_kernel_patch.capture_decoding(on)
    return f"capture_decoding({on})"
