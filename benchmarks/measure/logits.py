"""How far the logits of decoded tokens lie from those of transformers, and of more digits."""

from __future__ import annotations

from typing import Any

import torch

import hf_kernel_patch
from benchmarks.measure.environment import DTYPES
from benchmarks.workloads import models

STEPS = 16


@torch.no_grad()
def check(job: dict[str, Any], model: Any) -> dict[str, Any]:
    """``generate`` as it is patched, beside the original that is given the same tokens.

    The tokens are those that the patched model chooses, so nothing comes between ``generate`` and
    the patch. Afterwards nothing is patched, and the weights are of another type where that fits.
    """
    steps, dtype = min(STEPS, job["new"]), DTYPES[job["dtype"]]
    ids = models.token_ids(job, job["prompt"])
    found = model.generate(
        ids,
        max_new_tokens=steps,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        attention_mask=torch.ones_like(ids),
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = found.sequences[:, ids.shape[1] :]
    # The first are of the prefill.
    patched = torch.stack(found.logits[1:], 1)
    del found
    hf_kernel_patch.unpatch()
    original = _forced(model, ids, tokens)
    answer: dict[str, Any] = {
        "checked_tokens": tokens[0].tolist(),
        "logits_apart": _distance(patched, original),
    }
    if hasattr(model, "set_experts_implementation"):  # others have no kernels of that type
        model.set_experts_implementation("eager")
    finer = torch.float64 if dtype is torch.float32 else torch.float32
    try:
        exact = _forced(model.to(finer), ids, tokens)
    except torch.OutOfMemoryError:
        return answer
    return answer | {
        "logits_error": _distance(patched, exact),
        "logits_error_original": _distance(original, exact),
    }


def _forced(model: Any, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(batch, steps - 1, vocabulary) logits after each of the tokens but the last."""
    named = models.cache_name(model)
    cache = getattr(model(ids, use_cache=True, logits_to_keep=1), named)
    found = []
    for place in range(tokens.shape[1] - 1):
        step = tokens[:, place : place + 1]
        found.append(model(step, use_cache=True, **{named: cache}).logits[:, -1])
    return torch.stack(found, 1)


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm())
