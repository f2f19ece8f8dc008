"""One model's patch and classes that somebody else swaps in, as FSDP2's ``fully_shard`` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_kernel_patch
from hf_kernel_patch import ForeignPatchError, apply_default_kernels, unpatch
from tests.support.probes import logits, served
from tests.support.scope import LAYERS, close, kinds, parts_of, same, state
from tests.support.tiny import tiny_model


class Mixin:
    """What FSDPModule is to FSDP2."""

    def reshard(self) -> str:
        return "resharded"


def shard(module: nn.Module) -> None:
    """As ``fully_shard``: a new class in front of the module's own."""
    kind = type(module)
    module.__class__ = type(f"FSDP{kind.__name__}", (Mixin, kind), {})


def sharded(model: Any, where: str) -> list[Any]:
    parts = {
        "layers": list(model.model.layers),
        "norms": [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"],
        "attention": [layer.self_attn for layer in model.model.layers],
        "everything": parts_of(model),
    }[where]
    for module in parts:
        shard(module)
    return parts


@pytest.mark.parametrize("where", ["layers", "norms", "attention", "everything"])
def test_classes_swapped_before_are_patched_and_come_back(where: str) -> None:
    model = tiny_model("llama").eval()
    eager = logits(model)
    parts = sharded(model, where)
    before = state(model)
    apply_default_kernels(model, LAYERS)
    hf_kernel_patch.count_calls()
    close(model, eager)
    assert all(row.served for row in hf_kernel_patch.status())
    assert all(isinstance(part, Mixin) and part.reshard() == "resharded" for part in parts)
    unpatch(model)
    assert same(state(model), before)
    assert torch.equal(logits(model), eager)


@pytest.mark.parametrize("where", ["norms", "attention"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["one model", "all"])
def test_classes_swapped_over_ours_are_named_and_never_restored_past(
    where: str, everywhere: bool
) -> None:
    model, other = tiny_model("llama").eval(), tiny_model("llama")
    eager, before, other_before = logits(model), state(model), state(other)
    apply_default_kernels(model, LAYERS)
    apply_default_kernels(other, LAYERS)
    parts = sharded(model, where)
    taken = [type(part) for part in parts]
    close(model, eager)
    with pytest.raises(ForeignPatchError, match="FSDPLlama") as caught:
        unpatch() if everywhere else unpatch(model)
    assert "everything else is restored" in str(caught.value)
    assert [type(part) for part in parts] == taken
    assert all(part.reshard() == "resharded" for part in parts)
    names = {name for name, module in model.named_modules() if module in parts}
    now = state(model)
    held = [key for key in before if key[0] not in names]
    assert all(now[key] is before[key] for key in held)
    assert same(state(other), other_before) == everywhere
    hf_kernel_patch.count_calls()
    assert torch.equal(logits(model), eager)
    assert not [row for row in hf_kernel_patch.status() if row.served]
    unpatch(model)
    unpatch()
    assert same(state(other), other_before)


def test_classes_swapped_over_ours_and_back_are_no_hindrance() -> None:
    model = tiny_model("llama")
    before = state(model)
    apply_default_kernels(model, LAYERS)
    parts = sharded(model, "norms")
    for part in parts:
        part.__class__ = type(part).__mro__[2]
    unpatch(model)
    assert same(state(model), before)


def test_layers_swapped_over_a_patched_model_do_not_hinder() -> None:
    model = tiny_model("llama").eval()
    eager, before = logits(model), kinds(model)
    apply_default_kernels(model, LAYERS)
    layers = sharded(model, "layers")
    close(model, eager)
    unpatch(model)
    assert all(isinstance(layer, Mixin) for layer in layers)
    assert [k for k in kinds(model) if not issubclass(k, Mixin)] == [
        k for k in before if "DecoderLayer" not in k.__name__
    ]
    assert torch.equal(logits(model), eager)


def test_the_fully_shard_of_torch_takes_a_patched_model() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny_model("llama").eval()
        eager = logits(model)
        apply_default_kernels(model, LAYERS)
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        hf_kernel_patch.count_calls()
        close(model, eager)
        assert served(hf_kernel_patch.status())
        unpatch(model)
        assert type(model).__name__ == "FSDPLlamaForCausalLM"
    finally:
        dist.destroy_process_group()
