"""Decoding by ``generate``, in the process of a variant: seconds a token, and what comes before."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import graphs
from benchmarks.measure.environment import synchronize
from benchmarks.measure.memory import after_first_call, peak_gib, reset_peak
from benchmarks.workloads import models
from benchmarks.workloads.variants import Variant

Answer = dict[str, Any]
#: So many first tokens may take longer than the others, for what is prepared at them.
_FIRST = 8


class Generating:
    """Greedy decoding of a batch; ``generate`` is that of transformers."""

    def __init__(self, job: dict[str, Any], variant: Variant, model: Any):
        self.model, self.ids = model, models.token_ids(job, job["prompt"])
        model.eval()
        model.generation_config.eos_token_id = None  # or it might stop early
        self.options: dict[str, Any] = {
            "do_sample": False,
            "use_cache": True,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(self.ids),
        }
        if variant.compiled:
            self._compile(job["device"])
        if variant.loop:
            costs_nothing(model)

    def _compile(self, device: str) -> None:
        # What another batch has compiled would make this one compile for any batch.
        torch._dynamo.reset()
        self.options["cache_implementation"] = "static"
        if device == "cpu":  # elsewhere generate compiles without being told
            from transformers import CompileConfig

            compiling = CompileConfig()
            compiling._compile_all_devices = True
            self.options["compile_config"] = compiling

    def generate(self, new: int) -> torch.Tensor:
        """The prompts and ``new`` tokens after each."""
        return self.model.generate(self.ids, max_new_tokens=new, **self.options)

    def prefill(self) -> Any:
        """The part of ``generate`` that reads the prompts."""
        return self.model(self.ids, use_cache=True, logits_to_keep=1).logits


def prepare(
    job: dict[str, Any], variant: Variant, model: Any
) -> tuple[Answer, Callable[[], Answer]]:
    """Decode until nothing is new; how that went, and what measures a token after the first."""
    device, new = job["device"], job["new"]
    run = (graphs.Replaying if variant.graph else Generating)(job, variant, model)
    first_tokens = max(1, min(_FIRST, new // 2))

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(device)
        begin = time.perf_counter()
        with torch.no_grad():
            found = call()
        synchronize(device)
        return time.perf_counter() - begin, found

    def measure() -> Answer:
        whole = timed(lambda: run.generate(new))[0]
        few, prompt = timed(lambda: run.generate(first_tokens))[0], timed(run.prefill)[0]
        later = (whole - few) / (new - first_tokens)
        return {
            "seconds": [(whole - prompt) / (new - 1)],
            "prefill_s": prompt,
            "generate_s": whole,
            "later_s": later,
            "start_s": few - prompt - (first_tokens - 1) * later,
        }

    info: Answer = {}
    info["first_s"], tokens = timed(lambda: run.generate(new))
    assert tokens.shape[-1] == job["prompt"] + new
    if not variant.loop:
        info["tokens"] = tokens[0, job["prompt"] :].tolist()
        info["bytes"] = models.bytes_of_token(model, job["batch"], job["prompt"] + new // 2)
    for _ in range(job["warmup"] + variant.compiled):
        measure()
    return info | _peaks(run, device, new), measure


@torch.no_grad()
def _peaks(run: Generating | graphs.Replaying, device: str, new: int) -> Answer:
    """Peak memory, and on an accelerator its parts: of the prefill, and of all that follows."""
    reset_peak(device)
    run.prefill()
    first = peak_gib(device)
    with after_first_call(run.model, lambda: reset_peak(device)):
        run.generate(new)
    rest = peak_gib(device)
    parts = {} if device == "cpu" else {"prefill_gib": first, "decode_gib": rest}
    return {"peak_gib": max(first, rest), **parts}


def costs_nothing(model: Any) -> None:
    """Replace the model's forward: constant logits, and the cache one layer that only counts."""
    from transformers.cache_utils import DynamicLayer
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Counting(DynamicLayer):
        def __init__(self) -> None:
            super().__init__()
            self.is_initialized, self.length = True, 0

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return self.length

    found: dict[int, torch.Tensor] = {}
    named = models.cache_name(model)

    # generate reads the signature, to know what it may pass.
    @functools.wraps(model.forward)
    def forward(input_ids: Any, **kwargs: Any) -> Any:
        batch, cache = len(input_ids), kwargs.get(named)
        if batch not in found:
            shape = batch, 1, model.config.vocab_size
            found[batch] = torch.zeros(shape, dtype=model.dtype, device=model.device)
        if cache is not None:
            if not cache.layers or not isinstance(cache.layers[0], Counting):
                cache.layers[:] = [Counting()]
            cache.layers[0].length += input_ids.shape[1]
        return CausalLMOutputWithPast(logits=found[batch], **{named: cache})

    model.forward = forward
