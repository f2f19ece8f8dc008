"""Caches that users make, change the class of, or hand from one model to another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.support.decoding import Fused, alone, check, contents, decode, ids, started
from tests.support.tiny import TRANSFORMERS_5


@pytest.mark.skipif(TRANSFORMERS_5, reason="no tuples as caches since transformers 5")
def test_tuples_as_caches() -> None:
    def run(model: Any) -> Any:
        _, cache = started(model)
        legacy = cache.to_legacy_cache()
        given = DynamicCache.from_legacy_cache(legacy)
        return decode(model, ids(2, 1), given), legacy

    check(run, alone)


def test_a_class_of_the_users() -> None:
    class Counted(DynamicCache):
        updates = 0

        def update(self, *given: Any, **options: Any) -> Any:
            type(self).updates += 1
            return super().update(*given, **options)

    def run(model: Any) -> Any:
        Counted.updates = 0
        found = decode(model, cache=Counted(config=model.config))
        return found, Counted.updates

    check(run, alone, replays=False)


def test_an_update_that_is_set_on_the_cache() -> None:
    def run(model: Any) -> Any:
        token, cache = started(model)
        calls, original = [], cache.update

        def update(*given: Any, **options: Any) -> Any:
            calls.append(given[2])
            return original(*given, **options)

        cache.update = update
        found = decode(model, token, cache)[0]
        return found, calls, contents(cache)

    check(run, alone, replays=None)


def test_the_cache_of_another_model(fused: Fused) -> None:
    """Of the same sizes, as for a model that was trained further."""

    def run(model: Any) -> Any:
        token, cache = started(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.mul_(-1)
        one = decode(other, token, cache)
        return one, decode(model, token, cache)

    check(run, fused)
