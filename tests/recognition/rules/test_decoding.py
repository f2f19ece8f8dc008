"""Parts of decoding by themselves: memory, what is watched, what a capture refuses."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.ops.decode_attention import TorchFusedDecodeAttention
from hf_kernel_patch.recognition.rules.decoding import memory, replay
from hf_kernel_patch.recognition.rules.decoding.attention import entries_of
from hf_kernel_patch.recognition.rules.decoding.caches import length_of
from hf_kernel_patch.recognition.rules.decoding.call import CannotCapture
from hf_kernel_patch.recognition.rules.decoding.memory import Memory, bucket_for, capacity_for
from hf_kernel_patch.recognition.rules.decoding.parts import Parts
from tests.support.decoding import INCLUDE, build, decode, generate, ids, reasons, replayed
from tests.support.tiny import modelling

CPU = torch.device("cpu")
KERNEL = "torch_fused_decode_attention"


def filled(length: int, window: int | None = None, layers: int = 2) -> Any:
    """A cache of random keys and values, of layers with a window where one is given."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache()
    made = [DynamicSlidingWindowLayer(window) if window else DynamicLayer() for _ in range(layers)]
    cache.layers = made
    cache.layer_class_to_replicate = None
    for index in range(layers):
        cache.update(torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 6), index)
    return cache


def contents(cache: Any) -> list[torch.Tensor]:
    return [t.clone() for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 511, 512, 513, 16384])
def test_memory_has_room_and_is_not_much_larger(tokens: int) -> None:
    assert tokens < capacity_for(tokens) <= tokens * (1 + 1 / memory.ROOM) + 2 * memory.STEP
    assert capacity_for(tokens) % memory.STEP == 0
    assert tokens <= bucket_for(tokens) <= max(2 * tokens, memory.SMALLEST)


def test_a_cache_shows_the_same_before_and_after() -> None:
    cache = filled(9)
    before = contents(cache)
    held = Memory(cache, length_of(cache, CPU, 1))
    assert held.length == 9 and held.is_shown_by(cache)
    assert all(map(torch.equal, contents(cache), before))
    held.layers[0].keys[:, :, 9] = 5.0  # what a captured token writes
    held.advance(cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [10, 10]
    assert torch.equal(cache.layers[0].keys[:, :, :9], before[0])
    assert (cache.layers[0].keys[:, :, 9] == 5.0).all() and held.is_shown_by(cache)


def test_a_full_memory_grows_and_leaves_earlier_contents() -> None:
    cache = filled(9)
    held = Memory(cache, 9)
    kept, numbers = contents(cache), []
    for _ in range(200):
        held.make_room()
        held.advance(cache)
        numbers.append(held.number())
    assert held.version == 2 and cache.layers[0].keys.shape[2] == 209
    assert torch.equal(cache.layers[1].values[:, :, :9], kept[3])
    assert len(set(numbers)) == 1  # all in the smallest bucket


def test_a_window_holds_its_last_tokens() -> None:
    cache = filled(9, window=8)
    assert cache.layers[0].keys.shape[2] == 7  # the window without the token that is to come
    held = Memory(cache, length_of(cache, CPU, 1))
    for place in range(9, 300):
        held.make_room()
        layer = held.layers[0]
        layer.keys[:, :, place - layer.start] = place
        held.advance(cache)
    shown = cache.layers[0]
    assert shown.cumulative_length == 300 and shown.keys.shape[2] == 7
    assert shown.keys[0, 0, :, 0].tolist() == list(range(293, 300))
    assert layer.keys.shape[2] <= capacity_for(8), "a window's memory does not grow"


@pytest.mark.parametrize("change", ["keys", "layer", "attribute", "length"])
def test_what_others_do_to_a_cache_is_seen(change: str) -> None:
    cache = filled(9, window=8 if change == "length" else None)
    held = Memory(cache, 9)
    if change == "keys":
        cache.layers[1].keys = cache.layers[1].keys[:, :, :8]
    elif change == "layer":
        cache.layers[0] = filled(9).layers[0]
    elif change == "attribute":
        cache.layers[1].update = lambda *given: given
    else:
        cache.layers[0].cumulative_length = 8
    assert not held.is_shown_by(cache)


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        (None, "there is no cache"),
        (DynamicCache(), "empty"),
        (filled(4), "another batch"),
    ],
    ids=["none", "empty", "batch"],
)
def test_a_cache_that_has_no_graph_says_why(cache: Any, reason: str) -> None:
    with pytest.raises(CannotCapture, match=reason):
        length_of(cache, CPU, 3)


def _replace_module(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def _replace_weight(model: Any) -> None:
    old = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(old.detach().clone())


def _set_attribute(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 1.0


def _set_config(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


def _set_forward(model: Any) -> None:
    model.model.norm.forward = lambda x: x


def _add_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *given: None)


def _train(model: Any) -> None:
    model.model.layers[0].train()


@pytest.mark.parametrize(
    "change",
    [
        _replace_module,
        _replace_weight,
        _set_attribute,
        _set_config,
        _set_forward,
        _add_hook,
        _train,
    ],
)
def test_a_change_of_the_model_is_seen(change: Any) -> None:
    model = build()
    parts = Parts(model, entries_of(model.modules()))
    assert parts.in_place() and parts.unchanged() and parts.why_not(CPU) is None
    change(model)
    assert not parts.unchanged()


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "rotate_half", "repeat_kv"])
def test_a_replaced_function_of_the_module_is_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(attn_implementation="eager")
    parts = Parts(model, entries_of(model.modules()))
    monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name).__call__)
    assert not parts.unchanged()


def test_moved_weights_are_seen_before_a_replay() -> None:
    model = build()
    parts = Parts(model, ())
    weight = model.lm_head.weight
    with torch.no_grad():
        weight.add_(1.0)
    assert parts.in_place() and parts.unchanged()
    weight.data = weight.data.clone()
    assert not parts.in_place()


def tokens_of(model: Any) -> torch.Tensor:
    """What it generates."""
    return generate(model, ids()).sequences


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[TorchFusedDecodeAttention]]:
    """A kernel of one test, which is patched by "mine"."""
    cls = type("Mine", (TorchFusedDecodeAttention,), {"kernel_id": "mine"})
    monkeypatch.setitem(registry.kernels(), "mine", cls)
    yield cls
    hf_kernel_patch.unpatch()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One element for each capture that is tried."""
    found: list[object] = []
    original = replay._Model._capture

    def capture(self: Any, *given: Any) -> Any:
        found.append(self)
        return original(self, *given)

    monkeypatch.setattr(replay._Model, "_capture", capture)
    return found


def test_a_graph_with_wrong_logits_is_not_used(kernel: Any, captures: list[object]) -> None:
    def wrong(query: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        return torch.zeros_like(query).transpose(1, 2)

    kernel.function = staticmethod(wrong)
    model = build()
    expected = tokens_of(model)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("mine", models="llama") as report:
        for _ in range(3):
            assert torch.equal(tokens_of(model), expected)
        assert not replayed(report)
        assert any("from the original's" in reason for reason in reasons(report))
    assert len(captures) == 1, "it is not tried again as long as the model stays as it is"


def test_a_capture_that_fails_leaves_the_original(kernel: Any, captures: list[object]) -> None:
    def fails(*given: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no such luck\nand more lines")

    kernel.function = staticmethod(fails)
    model = build()
    expected = tokens_of(model)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("mine", models="llama") as report:
        assert torch.equal(tokens_of(model), expected)
        assert torch.equal(tokens_of(model), expected)
        assert reasons(report) == {"RuntimeError: no such luck"}
        assert len(captures) == 1
        model.config.rms_norm_eps = 2e-6  # the model is another now
        tokens_of(model)
        assert len(captures) == 2


def test_many_kinds_of_calls_keep_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "GRAPHS_A_MODEL", 2)
    model = build()
    with hf_kernel_patch.patched(INCLUDE, models="llama"):
        for batch in (1, 2, 3, 4):
            generate(model, ids(batch))
        assert [len(one._tokens) for one in _held() if one._tokens] == [2]


def _held() -> list[Any]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is replay._Model]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2"])
def test_the_source_shows_one_more_line_and_moves_none(name: str) -> None:
    module = modelling(name)
    cls = next(v for k, v in vars(module).items() if k.endswith("ForCausalLM"))
    before = inspect.unwrap(cls.forward)
    lines, first = inspect.getsourcelines(before)
    with hf_kernel_patch.patched(KERNEL, models=name):
        after, start = inspect.getsourcelines(inspect.unwrap(cls.forward))
    assert start == first and len(after) == len(lines)
    added = [line for line in after if line not in lines]
    assert any("decode(self, input_ids, attention_mask" in line for line in added)
    assert len(added) == 2  # and the two parameters that stand on one line now


@torch.no_grad()
def test_capture_decoding_switches_it_off() -> None:
    model = build()
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(INCLUDE, models="llama") as report:
        hf_kernel_patch.capture_decoding(False)
        try:
            expected = decode(model)[0]
        finally:
            hf_kernel_patch.capture_decoding(True)
        assert not replayed(report)
        found = decode(model)[0]
        assert replayed(report)
    for one, other in zip(found, expected):
        assert torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-4)
