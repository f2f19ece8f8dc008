"""Run in two processes: frameworks that walk over a model's output in every training step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import hf_kernel_patch
from hf_kernel_patch.recognition.rules.head_loss.logits import Logits
from tests.distributed.sharded import full, leave
from tests.support.tiny import error, tiny_model, tokens


def ddp(**options: Any) -> Callable[[Any], Any]:
    return lambda model: DistributedDataParallel(model, **options)


def fsdp2(**policy: Any) -> Callable[[Any], Any]:
    def shard(model: Any) -> Any:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))

    return shard


def mixed_precision(model: Any) -> Any:
    from accelerate.utils import convert_outputs_to_fp32

    wrapped = DistributedDataParallel(model)
    wrapped.forward = convert_outputs_to_fp32(wrapped.forward)
    return wrapped


CASES: dict[str, Callable[[Any], Any]] = {
    "DDP": ddp(),
    "DDP, unused parameters": ddp(find_unused_parameters=True),
    "DDP, static graph": ddp(static_graph=True),
    "DDP, mixed precision": mixed_precision,
    "FSDP2": fsdp2(),
    "FSDP2, half the output": fsdp2(output_dtype=torch.bfloat16),
}


def step(wrap: Callable[[Any], Any], include: str | None) -> dict[str, Any]:
    """Two training steps that read the loss alone, and then the logits of the second."""
    model = wrap(tiny_model("llama").train())
    ids = tokens(4, seed=dist.get_rank())
    made = []
    make = Logits.make
    Logits.make = lambda self: made.append(True) or make(self)  # type: ignore[method-assign, func-returns-value]
    hf_kernel_patch.count_calls()
    try:
        with hf_kernel_patch.patched(include, models="llama") as report:
            for _ in range(2):
                output = model(ids, labels=ids)
                output.loss.backward()
            unread = len(made)
            logits = output.logits
    finally:
        Logits.make = make  # type: ignore[method-assign]
    return {
        "logits": full(logits.float()),
        "needs": (logits.requires_grad, logits.is_leaf, str(logits.dtype)),
        "type": type(logits) is torch.Tensor,
        "gradients": {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None},
        "unread": unread,
        "served": sum(row.served for row in report),
    }


def main() -> None:
    dist.init_process_group("gloo")
    found = {}
    for name, wrap in CASES.items():
        eager, ours = step(wrap, None), step(wrap, "linear_cross_entropy")
        found[name] = {
            "computed": ours["unread"],
            "served": ours["served"],
            "same": ours["needs"] == eager["needs"] and ours["type"],
            "logits": error(ours["logits"], eager["logits"]),
            "gradients": max(error(ours["gradients"][n], g) for n, g in eager["gradients"].items()),
        }
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)
    leave()


if __name__ == "__main__":
    main()
