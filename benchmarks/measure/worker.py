"""One variant of one model in a process of its own, so that no patch reaches another variant.

``python -m benchmarks.measure.worker JOB`` builds and says so. Then it answers every line that it
reads, ``["prepare", BATCH]``, ``["measure", BATCH]`` or ``["check", BATCH]``. Lines that begin with
``RESULT`` are answers, in JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import decoding, logits
from benchmarks.measure.environment import DTYPES, synchronize
from benchmarks.measure.memory import peak_gib, reset_peak
from benchmarks.measure.timing import copy_rate, reason
from benchmarks.workloads import models, variants
from benchmarks.workloads.variants import VARIANTS

MARK = "RESULT "
Answer = dict[str, Any]


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.manual_seed(0)
    variant = VARIANTS[job["variant"]]
    device, config = job["device"], job["config"]
    info: Answer = {}
    if job["kind"] == "decode":
        info["copy_gbs"] = copy_rate(device, job["quick"])
        _free(device)
    told = variants.before_building(variant, config["model_type"], job["include"], job["loss_left"])
    experts = variant.experts if "num_experts" in config else None
    model = models.build(config, device, DTYPES[job["dtype"]], experts)
    if "patch" in told:
        info["patch"] = told["patch"].summary()
    _say(info)
    measure: Callable[[], Answer] | None = None
    for line in sys.stdin:
        request, batch = json.loads(line)
        sized = job | {"batch": batch}
        try:
            if request == "prepare":
                measure = None
                _free(device)
                prepare = _train if job["kind"] == "train" else decoding.prepare
                answer, measure = prepare(sized, variant, model)
            elif request == "check":
                measure = None
                _free(device)
                answer = logits.check(sized, model)
            else:
                answer = measure() if measure is not None else {}
        except Exception as error:  # a batch that does not fit loses no other
            answer = {"error": reason(error)}
        _say(answer)


def _say(answer: Answer) -> None:
    print(MARK + json.dumps(answer), flush=True)


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        getattr(torch, device).empty_cache()


def _train(
    job: dict[str, Any], variant: variants.Variant, model: Any
) -> tuple[Answer, Callable[[], Answer]]:
    """Training steps: forward and backward, and AdamW where the job says so."""
    device = job["device"]
    model.train()
    if variant.compiled:
        variants.compile_model(model, job["loss_left"])
    ids = models.token_ids(job, job["length"])
    optimizer = None
    if job["adamw"]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> Any:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    begin = time.perf_counter()
    loss = step()
    synchronize(device)
    info: Answer = {"first_s": time.perf_counter() - begin, "loss": float(loss)}
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    info["grad_norm"] = float(torch.stack([g.float().norm() for g in gradients]).norm())
    del gradients, loss

    def whole() -> float:
        model.zero_grad(set_to_none=True)
        synchronize(device)
        begin = time.perf_counter()
        step()
        if optimizer is not None:
            optimizer.step()
        synchronize(device)
        return time.perf_counter() - begin

    for _ in range(job["warmup"]):
        whole()
    reset_peak(device)

    def measure() -> Answer:
        times = [whole() for _ in range(job["steps"])]
        return {"seconds": times, "peak_gib": peak_gib(device)}

    return info, measure


if __name__ == "__main__":
    main()
