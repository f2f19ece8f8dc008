"""LoRA between two tokens: added, merged, switched, disabled, deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.decoding import Fused, alone, check, decode, generate, ids

peft = pytest.importorskip("peft")


def wrapped(model: Any, targets: str = "q_proj,v_proj,down_proj") -> Any:
    """A model with two adapters, of which the first is active and none is zero."""
    torch.manual_seed(2)
    options = {"r": 4, "target_modules": targets.split(","), "init_lora_weights": False}
    found = peft.get_peft_model(model, peft.LoraConfig(**options))
    found.add_adapter("other", peft.LoraConfig(**options))
    return found.eval()


def disabled(model: Any) -> Any:
    with model.disable_adapter():
        return decode(model)[0]


STEPS: dict[str, Callable[[Any], Any]] = {
    "switched": lambda model: model.set_adapter("other"),
    "merged": lambda model: model.merge_adapter(),
    "disabled": disabled,
    "deleted": lambda model: model.delete_adapter("other"),
    "unloaded": lambda model: model.merge_and_unload() and None,
}


@pytest.mark.parametrize("change", STEPS.values(), ids=STEPS)
def test_adapters_that_change(change: Callable[[Any], Any]) -> None:
    def run(model: Any) -> Any:
        tuned = wrapped(model)
        first, cache = decode(tuned)
        between = change(tuned)
        return first, between, decode(tuned, ids(2, 1), cache), decode(model)

    check(run, alone, replays=None)


def test_merged_and_back() -> None:
    def run(model: Any) -> Any:
        tuned = wrapped(model)
        tuned.merge_adapter()
        first, cache = decode(tuned)
        tuned.unmerge_adapter()
        return first, decode(tuned, ids(2, 1), cache)

    check(run, alone, replays=None)


def test_an_adapter_after_some_tokens(fused: Fused) -> None:
    def run(model: Any) -> Any:
        first, cache = decode(model)
        tuned = wrapped(model)
        second, cache = decode(tuned, ids(2, 1), cache)
        plain = tuned.unload()
        return first, second, decode(plain, ids(2, 1), cache), generate(plain)

    check(run, fused)


def test_all_merged_into_the_weights(fused: Fused) -> None:
    def run(model: Any) -> Any:
        return generate(wrapped(model, "q_proj,lm_head,embed_tokens").merge_and_unload())

    check(run, fused)
