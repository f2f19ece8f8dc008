"""Run in two processes: heads whose weights FSDP2 or tensor parallelism has sharded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import hf_kernel_patch
from tests.tiny import error, tiny_model, tokens

LOSS = "linear_cross_entropy"
MESH: Any = None


def root_alone(model: Any) -> None:
    fully_shard(model, mesh=MESH)


def head_by_itself(model: Any) -> None:
    fully_shard(model.lm_head, mesh=MESH)
    fully_shard(model, mesh=MESH)


def layers_and_root(model: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=MESH)
    fully_shard(model, mesh=MESH)


def mixed_precision(model: Any) -> None:
    fully_shard(model, mesh=MESH, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def column_parallel(model: Any) -> None:
    style = ColwiseParallel(output_layouts=Replicate(), use_local_output=True)
    parallelize_module(model.lm_head, MESH, style)


CASES: dict[str, tuple[Callable[[Any], None], bool]] = {
    "root alone": (root_alone, False),
    "root alone, tied": (root_alone, True),
    "head by itself": (head_by_itself, False),
    "layers and root": (layers_and_root, False),
    "mixed precision": (mixed_precision, False),
    "column parallel": (column_parallel, False),
}


def full(tensor: Any) -> torch.Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def step(shard: Callable[[Any], None], tied: bool, include: str | None) -> dict[str, Any]:
    model = tiny_model("llama", tie_word_embeddings=tied).train()
    shard(model)
    hf_kernel_patch.count_calls()
    ids = tokens(4)
    with hf_kernel_patch.patched(include, models="llama") as report:
        output = model(ids, labels=ids)
        output.loss.backward()
    return {
        "loss": output.loss.detach(),
        "gradients": {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None},
        "logits": full(output.logits.float()),  # after the backward, where all is sharded again
        "calls": [dict(row.calls) for row in report],
    }


def main() -> None:
    global MESH
    dist.init_process_group("gloo")
    MESH = init_device_mesh("cpu", (2,))
    found = {}
    for name, (shard, tied) in CASES.items():
        eager, ours = step(shard, tied, None), step(shard, tied, LOSS)
        worst = max(error(ours["gradients"][n], g) for n, g in eager["gradients"].items())
        found[name] = {
            "loss": error(ours["loss"], eager["loss"]),
            "gradients": worst,
            "logits": error(ours["logits"], eager["logits"]),
            "names": sorted(ours["gradients"]) == sorted(eager["gradients"]),
            "calls": ours["calls"],
        }
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
