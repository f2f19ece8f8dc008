"""One variant of one model in a process of its own, so that no patch reaches another variant.

``python -m benchmarks.measure.worker JOB`` builds, warms up, says so, and then measures once for
every line that it reads. Lines that begin with ``RESULT`` are answers, in JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure.environment import DTYPES, synchronize
from benchmarks.workloads import models, variants
from benchmarks.workloads.variants import VARIANTS

MARK = "RESULT "
Answer = dict[str, Any]


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.manual_seed(0)
    variant = VARIANTS[job["variant"]]
    device, config = job["device"], job["config"]
    told = variants.before_building(variant, config["model_type"], job["include"], job["loss_left"])
    experts = variant.experts if "num_experts" in config else None
    model = models.build(config, device, DTYPES[job["dtype"]], experts)
    info, measure = {"train": _train, "decode": _decode}[job["kind"]](job, variant, model)
    if "patch" in told:
        info["patch"] = told["patch"].summary()
    _say(info)
    for _ in sys.stdin:
        _say(measure())


def _say(answer: Answer) -> None:
    print(MARK + json.dumps(answer), flush=True)


def _train(
    job: dict[str, Any], variant: variants.Variant, model: Any
) -> tuple[Answer, Callable[[], Answer]]:
    """Training steps: forward and backward, and AdamW where the job says so."""
    device = job["device"]
    model.train()
    if variant.compiled:
        variants.compile_model(model, job["loss_left"])
    ids = token_ids(job, job["length"])
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
    _reset_peak(device)

    def measure() -> Answer:
        times = [whole() for _ in range(job["steps"])]
        return {"seconds": times, "peak_gib": _peak_gib(device)}

    return info, measure


def _decode(
    job: dict[str, Any], variant: variants.Variant, model: Any
) -> tuple[Answer, Callable[[], Answer]]:
    """Greedy decoding by ``generate``: seconds a token after the first, the prompt's taken off."""
    device, new = job["device"], job["new"]
    model.eval()
    ids = token_ids(job, job["prompt"])
    model.generation_config.eos_token_id = None  # or it might stop early
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    if variant.compiled:
        from transformers import CompileConfig

        # generate compiles the steps by itself where the cache is static.
        compiling = CompileConfig()
        compiling._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": compiling}

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(device)
        begin = time.perf_counter()
        with torch.no_grad():
            found = call()
        synchronize(device)
        return time.perf_counter() - begin, found

    def prefill() -> Any:
        return model(ids, use_cache=True, logits_to_keep=1).logits

    first, tokens = timed(lambda: model.generate(ids, **options))
    assert tokens.shape[-1] == job["prompt"] + new
    for _ in range(job["warmup"]):
        timed(lambda: model.generate(ids, **options))
        timed(prefill)
    _reset_peak(device)

    def measure() -> Answer:
        whole, prompt = timed(lambda: model.generate(ids, **options))[0], timed(prefill)[0]
        seconds = [(whole - prompt) / (new - 1)]
        return {"seconds": seconds, "prefill_s": prompt, "peak_gib": _peak_gib(device)}

    return {"first_s": first, "tokens": tokens[0, job["prompt"] :].tolist()}, measure


def token_ids(job: dict[str, Any], length: int) -> torch.Tensor:
    """(batch, length) random tokens, the same in every variant."""
    generator = torch.Generator().manual_seed(1)
    shape = job["batch"], length
    ids = torch.randint(3, job["config"]["vocab_size"], shape, generator=generator)
    return ids.to(job["device"])


def _reset_peak(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).reset_peak_memory_stats()


def _peak_gib(device: str) -> float:
    """Of device memory; of the whole process on a CPU."""
    if device != "cpu":
        return float(getattr(torch, device).max_memory_allocated()) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main()
