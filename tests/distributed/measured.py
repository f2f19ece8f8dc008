"""A training of two processes whose ops are measured: how many steps it takes, and who writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

import hf_kernel_patch
from tests.support.tiny import tiny_model, tokens


def train() -> dict[str, Any]:
    """Steps until something is chosen, and what the rows say then."""
    first = 1000 * torch.distributed.get_rank()
    model = DistributedDataParallel(tiny_model("llama", num_hidden_layers=1).train())
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with hf_kernel_patch.patched("measured", models="llama") as report:
        for step in range(200):
            ids = tokens(seed=first + step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            texts = [row.measured for row in report.patched]
            if all("; measured now" in text or "; from " in text for text in texts):
                break
        return {"steps": step, "texts": texts}


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    runs: list[Any] = []
    for _ in range(2):
        found: list[Any] = [None, None]
        torch.distributed.all_gather_object(found, train())
        runs.append(found)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(runs))
    torch.distributed.destroy_process_group()
