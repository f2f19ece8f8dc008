"""Decoding from CUDA graphs: what is checked before each replay, and the replays themselves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import hf_kernel_patch
from hf_kernel_patch.recognition.rules import decoding
from hf_kernel_patch.recognition.rules.decoding import _Parts
from hf_kernel_patch.recognition.site import REPLAYED
from tests.tiny import TRANSFORMERS_5, tiny_model, tokens

GPU = torch.cuda.is_available()


@pytest.fixture
def layer() -> Any:
    return tiny_model("llama").eval().model.layers[0]


def hook(layer: Any) -> None:
    layer.mlp.up_proj.register_forward_hook(lambda *args: None)


def own_forward(layer: Any) -> None:
    layer.self_attn.o_proj.forward = lambda x: x


def swapped(layer: Any) -> None:
    layer.mlp.up_proj = nn.Linear(64, 96, bias=False)


def other_weight(layer: Any) -> None:
    layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(96, 64))


def moved_weight(layer: Any) -> None:
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.clone()


def other_class(layer: Any) -> None:
    layer.mlp.up_proj.__class__ = type("Mine", (nn.Linear,), {})


def part_in_training(layer: Any) -> None:
    layer.mlp.train()


@pytest.mark.parametrize(
    "change",
    [hook, own_forward, swapped, other_weight, moved_weight, other_class, part_in_training],
)
def test_a_change_inside_of_a_layer_is_seen(layer: Any, change: Callable[[Any], None]) -> None:
    parts = _Parts(layer)
    assert parts.unchanged()
    change(layer)
    assert not parts.unchanged()


def test_the_hooks_by_which_transformers_collects_outputs_stop_no_capture() -> None:
    model = tiny_model("llama").eval()
    parts = _Parts(model.model.layers[0])
    model(tokens(), output_hidden_states=True, output_attentions=True)
    assert parts.unchanged()
    assert _Parts(model.model.layers[0]).why_not() is None


def test_a_patched_norm_or_rotary_function_is_seen_and_new_values_are_not(layer: Any) -> None:
    parts = _Parts(layer)
    for kernel in ("rms_norm", "rope"):
        with hf_kernel_patch.patched(kernel, models="llama"):
            assert not parts.unchanged()
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)
    assert parts.unchanged()


def test_what_cannot_be_captured_is_named(layer: Any) -> None:
    assert _Parts(layer).why_not() is None
    layer.mlp.up_proj.__class__ = type("Mine", (nn.Linear,), {})
    assert "Mine" in str(_Parts(layer).why_not())
    hook(layer)
    layer.mlp.up_proj.__class__ = nn.Linear
    assert "hook" in str(_Parts(layer).why_not())


def test_a_weight_without_memory_of_its_own_is_named(layer: Any) -> None:
    class Quantised(torch.Tensor):
        @classmethod
        def __torch_dispatch__(
            cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert function is torch.ops.aten.detach.default
            return args[0]

    weight = layer.mlp.up_proj.weight
    made = torch.Tensor._make_wrapper_subclass(Quantised, weight.shape, dtype=weight.dtype)
    layer.mlp.up_proj.weight = nn.Parameter(made, requires_grad=False)
    parts = _Parts(layer)
    assert parts.unchanged()
    assert parts.why_not() == "a weight is a Quantised"


needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
gpu = [pytest.mark.gpu, needs_gpu]


@pytest.fixture
def patched() -> Iterator[Any]:
    with hf_kernel_patch.patched("auto", models=("llama", "qwen3", "qwen3_moe")) as report:
        yield report


def replays(report: Any) -> int:
    rows = [row for row in report if row.op == "add_rms_norm"]
    return sum(row.calls[REPLAYED] for row in rows)


def calls(report: Any) -> list[Any]:
    """What to read where a replay is missing."""
    return [(row.site, row.calls) for row in report]


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    model.generation_config.eos_token_id = None
    found: torch.Tensor = model.generate(ids, **options)
    return found


def without_graphs(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    hf_kernel_patch.capture_decoding(False)
    try:
        return call()
    finally:
        hf_kernel_patch.capture_decoding(True)


def on_gpu(name: str, **changes: Any) -> Any:
    return tiny_model(name, torch.bfloat16, **changes).cuda().eval()


class TestOnTheGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=str)
    def test_hidden_states_and_tokens_have_the_same_bits(
        self, name: str, mode: Any, patched: Any
    ) -> None:
        model = on_gpu(name)
        options = {"return_dict_in_generate": True, "output_hidden_states": True}
        for batch in (1, 3, 1):
            ids = tokens(batch, 9).cuda()
            with mode():
                plain: Any = without_graphs(lambda ids=ids: generated(model, ids, **options))  # type: ignore[misc]
                found: Any = generated(model, ids, **options)
            assert torch.equal(found.sequences, plain.sequences)
            for one, other in zip(found.hidden_states, plain.hidden_states, strict=True):
                assert all(map(torch.equal, one, other))
        assert replays(patched) >= 2 * 3 * 8, calls(patched)

    def test_weights_changed_in_place_are_seen_and_moved_ones_too(self, patched: Any) -> None:
        model = on_gpu("llama")
        ids = tokens(2, 9).cuda()
        generated(model, ids)
        for change in (
            lambda p: p.mul_(1.5),
            lambda p: setattr(p, "data", p.data.roll(1).clone()),
        ):
            with torch.no_grad():
                change(model.model.layers[0].mlp.up_proj.weight)
            plain = without_graphs(lambda: generated(model, ids))
            assert torch.equal(generated(model, ids), plain)

    @pytest.mark.skipif(not TRANSFORMERS_5, reason="generate of 4 compiles with a static cache")
    def test_a_static_cache_and_beams_agree(self, patched: Any) -> None:
        model = on_gpu("llama")
        ids = tokens(2, 9).cuda()
        static = {"cache_implementation": "static", "disable_compile": True}
        for options in (static, {"num_beams": 3}):
            plain = without_graphs(lambda o=options: generated(model, ids, **o))  # type: ignore[misc]
            assert torch.equal(generated(model, ids, **options), plain)
        assert replays(patched), calls(patched)

    def test_a_hook_sends_the_layer_back(self, patched: Any) -> None:
        model = on_gpu("llama")
        calls: list[int] = []
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *args: calls.append(1))
        generated(model, tokens(1, 9).cuda())
        assert len(calls) == 2 * 12 and not replays(patched)
        (reason,) = (r for row in patched for r in row.calls if "without" in r)
        assert "hook" in reason

    def test_training_autocast_and_gradients_are_not_replayed(self, patched: Any) -> None:
        model = on_gpu("llama")
        ids = tokens(1, 9).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            generated(model, ids)
        cache = model(ids, use_cache=True).past_key_values
        for _ in range(5):
            cache = model(ids[:, :1], use_cache=True, past_key_values=cache).past_key_values
        assert not replays(patched)

    def test_unpatch_frees_the_graphs(self) -> None:
        model = on_gpu("llama")
        with hf_kernel_patch.patched("auto", models="llama") as report:
            generated(model, tokens(1, 9).cuda())
            assert replays(report), calls(report)
            graphs = [weakref.ref(g) for g in gc.get_objects() if isinstance(g, decoding._Layer)]
            assert len(graphs) == 2
        gc.collect()
        assert not any(reference() for reference in graphs)

    def test_a_deleted_model_takes_its_graphs_along(self, patched: Any) -> None:
        model = on_gpu("llama")
        generated(model, tokens(1, 9).cuda())
        weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        del model
        gc.collect()
        assert weight() is None
