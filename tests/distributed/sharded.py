"""Run in two processes: heads whose weights FSDP2 or tensor parallelism has sharded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy

import hf_kernel_patch
from tests.support.tiny import error, tiny_model, tokens

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


def sharded_again(model: Any) -> None:
    fully_shard(model, mesh=MESH, reshard_after_forward=True)


def mixed_precision(model: Any) -> None:
    fully_shard(model, mesh=MESH, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def column_parallel(model: Any) -> None:
    style = ColwiseParallel(output_layouts=Replicate(), use_local_output=True)
    parallelize_module(model.lm_head, MESH, style)


#: How to shard, whether the head is tied, and whether the loss is made of the logits.
CASES: dict[str, tuple[Callable[[Any], None], bool, bool]] = {
    "root alone": (root_alone, False, False),
    "root alone, tied": (root_alone, True, False),
    "root alone, logits": (root_alone, False, True),
    "root sharded again": (sharded_again, False, False),
    "root sharded again, logits": (sharded_again, False, True),
    "root sharded again, tied, logits": (sharded_again, True, True),
    "head by itself": (head_by_itself, False, False),
    "layers and root": (layers_and_root, False, False),
    "mixed precision": (mixed_precision, False, False),
    "column parallel": (column_parallel, False, False),
}


def full(tensor: Any) -> torch.Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def step(
    shard: Callable[[Any], None], tied: bool, of_logits: bool, include: str | None
) -> dict[str, Any]:
    model = tiny_model("llama", tie_word_embeddings=tied).train()
    shard(model)
    hf_kernel_patch.count_calls()
    # Ranks see other data, but for tensor parallelism, in which they share it.
    ids = tokens(4, seed=0 if shard is column_parallel else dist.get_rank())
    with hf_kernel_patch.patched(include, models="llama") as report:
        output = model(ids, labels=ids)
        loss = output.loss
        if of_logits:
            loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    return {
        "loss": output.loss.detach(),
        "gradients": {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None},
        "logits": full(output.logits.float()),  # after the backward, where all is sharded again
        "calls": [{str(call): n for call, n in row.calls.items()} for row in report],
    }


def main() -> None:
    global MESH
    dist.init_process_group("gloo")
    MESH = init_device_mesh("cpu", (2,))
    found = {}
    for name, case in CASES.items():
        eager, ours = step(*case, None), step(*case, LOSS)
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
    leave()


def leave() -> None:
    """End the process when both have got here, without taking the interpreter down.

    One of gloo's threads may still hold the last collective's tensors, and to let go of them it
    takes the interpreter's lock: if the interpreter is going down by then, it aborts. Destroying
    the group would wait for the threads, but caches of DTensor's keep the group alive. Without the
    barrier the other might be in its last collective yet. A process that raises does not get here;
    the launcher ends the other.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
