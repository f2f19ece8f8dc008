"""Checkpointed layers stay checkpointed: as many calls, as much kept for backward, as before."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import hf_kernel_patch
from tests.support.probes import run_python
from tests.support.scope import build, called
from tests.support.tiny import (
    largest_error,
    layer_ops_of,
    ops_of,
    outputs_and_gradients,
    tokens,
)

NAMES = ("llama", "qwen3", "gemma2", "qwen3_moe")
LAYERS = 2
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")


class Checkpoints:
    """The checkpointed calls of a model's layers, and what each keeps for backward."""

    def __init__(self, model: Any):
        self.kept: list[list[Any]] = []
        for layer in model.model.layers:
            layer._gradient_checkpointing_func = self._watch(layer._gradient_checkpointing_func)

    def _watch(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            kept: list[Any] = []
            self.kept.append(kept)

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                kept.append((tuple(tensor.shape), tensor.dtype))
                return tensor

            # What is computed inside is kept by the checkpoint's own hooks, if at all.
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                return checkpoint(*arguments, **options)

        return watched


def trained(name: str, use_reentrant: bool) -> tuple[Any, Checkpoints]:
    model = build(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model, Checkpoints(model)


def shard(model: Any) -> None:
    """Give each layer a class of its own, as FSDP2 does."""
    for layer in model.model.layers:
        kind = type(layer)
        layer.__class__ = type(f"FSDP{kind.__name__}", (kind,), {})


def unshard(model: Any) -> None:
    for layer in model.model.layers:
        layer.__class__ = type(layer).__mro__[1]


@cache
def original(name: str, use_reentrant: bool) -> tuple[dict[str, torch.Tensor], list[list[Any]]]:
    """Loss, logits and gradients of the original, and what its checkpoints keep."""
    model, checkpoints = trained(name, use_reentrant)
    return outputs_and_gradients(model), checkpoints.kept


@contextmanager
def patched(model: Any, name: str, scope: str) -> Iterator[None]:
    """All ops of the table, for all models or for this one."""
    if scope == "all models":
        with hf_kernel_patch.patched(ops_of(name), models=name, strict=True):
            yield
        return
    hf_kernel_patch.apply_default_kernels(model, ",".join(ops_of(name)))
    yield
    hf_kernel_patch.unpatch(model)


@pytest.mark.parametrize("sharded", ["never", "before", "during"])
@pytest.mark.parametrize("scope", ["all models", "one model"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", NAMES)
def test_calls_and_what_they_keep_are_the_original_s(
    name: str, use_reentrant: bool, scope: str, sharded: str
) -> None:
    truth, kept = original(name, use_reentrant)
    assert len(kept) == LAYERS and all(kept)
    model, ours = trained(name, use_reentrant)
    if sharded == "before":
        shard(model)
    kinds = [type(module) for module in model.modules()]
    with patched(model, name, scope):
        if sharded == "during":
            shard(model)
        assert largest_error(outputs_and_gradients(model), truth) < 1e-5
        assert ours.kept == kept
        in_layers = [row for row in called() if row.op in ("add_rms_norm", "qk_norm_rope")]
        # Once before and once while going back.
        assert [row.served for row in in_layers] == [2 * LAYERS] * len(in_layers)
        assert in_layers or name == "gemma2"
        if sharded == "during":
            unshard(model)
    assert [type(module) for module in model.modules()] == kinds
    assert largest_error(outputs_and_gradients(model), truth) == 0


def test_without_checkpoints_more_is_kept() -> None:
    """So that what the tests above compare is not nothing."""
    model, checkpoints = trained("llama", use_reentrant=False)
    model(tokens(), labels=tokens())
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = Checkpoints._watch(
            checkpoints, lambda function, *arguments: function(*arguments)
        )
    model(tokens(), labels=tokens())
    kept = [len(one) for one in checkpoints.kept]
    assert max(kept[:LAYERS]) < min(kept[LAYERS:]) / 5


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_past_the_hooks_of_a_checkpoint(name: str) -> None:
    """As an autograd function would that has tensors elsewhere than in ``save_for_backward``."""
    model, _ = trained(name, use_reentrant=False)

    def held() -> Counter[Any]:
        """The shapes of the tensors that a forward has made and that live on."""
        gc.collect()
        gc.freeze()  # what was there before is not among the objects
        try:
            hidden = model.model(tokens(), use_cache=False)[0]
            gc.collect()
            tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
            found = Counter((tuple(one.shape), one.dtype) for one in tensors)
        finally:
            gc.unfreeze()
        hidden.sum().backward()
        return found

    held()  # the first run makes what stays
    eager = held()
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True):
        assert not held() - eager


PROGRAM = """
import json, warnings
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import hf_kernel_patch
from tests.support.probes import changed, places
from tests.support.scope import build, called
from tests.support.tiny import largest_error, modelling, ops_of, outputs_and_gradients

warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*is deprecated")
dist.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
hf_kernel_patch.count_calls()

def shard(model):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

def step(model):
    return {{
        name: one.full_tensor() if isinstance(one, DTensor) else one
        for name, one in outputs_and_gradients(model).items()
    }}

def patch(name, model, scope):
    ops = [op for op in ops_of(name) if op != "decode_attention"]  # which no step trains
    if scope == "one model":
        hf_kernel_patch.apply_default_kernels(model, ops)
    else:
        hf_kernel_patch.patch_transformers(ops, models=name, strict=True)

def unpatch(model):
    try:
        hf_kernel_patch.unpatch()
    except hf_kernel_patch.ForeignPatchError as error:
        return str(error)
    return ""

def run(name, scope, when, truth):
    model = build(name).train()
    model.gradient_checkpointing_enable({{"use_reentrant": False}})
    before, kinds = places(), list(map(type, model.modules()))
    if when == "before":
        shard(model)
        kinds = list(map(type, model.modules()))
    patch(name, model, scope)
    if when == "during":
        shard(model)
    ours, rows = (step(model), called()) if when != "after" else (truth, [])
    foreign = unpatch(model)
    if when == "after":
        shard(model)
    return {{
        "ours": largest_error(ours, truth),
        "unserved": unserved(rows),
        "foreign": foreign,
        "changed": sorted(changed(before)),
        "kinds": all(map(restored, kinds, map(type, model.modules()))),
        "theirs": largest_error(step(model), truth),
        "again": again(name, model, scope, truth),
    }}

def restored(was, now):
    return now is was or now.__name__.startswith("FSDP") and issubclass(now, was)

def unserved(rows):
    "Sites without a call. With normed heads, the rotary function is called within another."
    whole = any(row.op == "qk_norm_rope" for row in rows)
    rows = [row for row in rows if not (whole and row.op == "rope" or row.code == "moe.decoding")]
    return [row.site for row in rows if not row.served]

def again(name, model, scope, truth):
    "Whether a sharded model is served by a further patch."
    patch(name, model, scope)
    worst, rows = largest_error(step(model), truth), called()
    unpatch(model)
    return [worst, unserved(rows)]

found = {{}}
for name in {names}:
    modelling(name)
    plain = build(name).train()
    eager = outputs_and_gradients(plain)
    sharded = build(name).train()
    shard(sharded)
    truth = step(sharded)
    found[name + ", sharding"] = largest_error(truth, eager)
    for scope in ("all models", "one model"):
        for when in ("before", "during", "after"):
            found[f"{{name}}, {{scope}}, {{when}}"] = run(name, scope, when, truth)
print("RESULT" + json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of its own finds, for process groups leave things behind."""
    store = tmp_path_factory.mktemp("store") / "store"
    done = run_python(PROGRAM.format(store=store, names=("llama", "qwen3_moe")))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT")[2])


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("scope", ["all models", "one model"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_fully_shard(sharded: dict[str, Any], name: str, scope: str, when: str) -> None:
    assert sharded[f"{name}, sharding"] < 1e-5
    found = sharded[f"{name}, {scope}, {when}"]
    assert found["ours"] < 1e-5
    assert found["theirs"] == 0
    assert not found["unserved"]
    assert not found["changed"]
    assert found["kinds"]
    # A class that FSDP2 made of ours for one model is FSDP2's, and is named.
    assert ("FSDP" in found["foreign"]) == ((scope, when) == ("one model", "during"))
    worst, left = found["again"]
    assert worst < 1e-5 and not left
