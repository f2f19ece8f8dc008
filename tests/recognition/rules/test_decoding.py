"""Decoding from graphs: what is checked before each replay, and the replays themselves.

On a CPU a stand-in takes the place of CUDA graphs, which calls what was captured again; all else is
the code that runs on a GPU.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from transformers import DynamicCache

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.ops._shared import graphs
from hf_kernel_patch.ops.add_rms_norm import TorchFusedAddRMSNorm
from hf_kernel_patch.recognition.outcome import How
from hf_kernel_patch.recognition.rules.decoding import layers as decoding
from hf_kernel_patch.recognition.wrappers import innermost_of
from tests.recognition.rules.plain_graphs import Graphs
from tests.support.tiny import TRANSFORMERS_5, having, layer_ops_of, modelling, tiny_model, tokens

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
gpu = [pytest.mark.gpu, needs_gpu]
#: Layers whose attention is not one statement of theirs.
UNCUT = {"qwen3_5", "qwen3_5_moe", "qwen3_next"} | (
    set() if TRANSFORMERS_5 else {"olmoe", "qwen2_moe"}
)
CUT = [name for name in having("add_rms_norm") if name not in UNCUT]


class Captured(TorchFusedAddRMSNorm):
    kernel_id = "captured_add_rmsnorm"
    device = "cpu"


class Where(NamedTuple):
    """Where a test runs, and what is patched there."""

    device: str
    dtype: torch.dtype
    graphs: Any

    def model(self, name: str, **changes: Any) -> Any:
        return tiny_model(name, self.dtype, **changes).to(self.device).eval()

    def tokens(self, batch: int = 2, length: int = 9) -> torch.Tensor:
        return tokens(batch, length).to(self.device)

    def kernels(self, name: str) -> Any:
        # The experts' kernels for a CPU count on nothing that a graph cannot hold.
        ops = (op for op in layer_ops_of(name) if op not in ("add_rms_norm", "moe"))
        return "auto" if self.device == "cuda" else (Captured.kernel_id, *ops)

    def patched(self, name: str) -> Any:
        return hf_kernel_patch.patched(self.kernels(name), models=name)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=gpu)])
def where(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Where]:
    if request.param == "cuda":
        yield Where("cuda", torch.bfloat16, graphs)
        return
    stand_in = Graphs()
    # A site keeps what it was made with: one class of kernels a test.
    kernel = type("Captured", (Captured,), {})
    monkeypatch.setitem(decoding.GRAPHS, "cpu", lambda: stand_in)
    monkeypatch.setitem(registry.kernels(), Captured.kernel_id, kernel)
    yield Where("cpu", torch.float32, stand_in)


def counts(report: Any) -> dict[str, int]:
    return {str(k): n for row in report if row.op == "add_rms_norm" for k, n in row.calls.items()}


def replays(report: Any) -> int:
    return counts(report).get(How.REPLAYED, 0)


def reasons(report: Any) -> set[str]:
    texts = (k.partition("without CUDA graphs: ") for k in counts(report))
    return {reason for _, found, reason in texts if found}


def generated(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    model.generation_config.eos_token_id = None
    return model.generate(ids, **options)


def without_graphs(call: Callable[[], Any]) -> Any:
    hf_kernel_patch.capture_decoding(False)
    try:
        return call()
    finally:
        hf_kernel_patch.capture_decoding(True)


def check(model: Any, ids: torch.Tensor, **options: Any) -> None:
    """With and without graphs, ``generate`` gives the same tokens and hidden states, to the bit."""
    options |= {"return_dict_in_generate": True, "output_hidden_states": True}
    plain = without_graphs(lambda: generated(model, ids, **options))
    found = generated(model, ids, **options)
    assert torch.equal(found.sequences, plain.sequences)
    for one, other in zip(found.hidden_states, plain.hidden_states, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", CUT)
def test_every_architecture_has_the_same_bits(name: str, where: Where) -> None:
    model = where.model(name)
    with where.patched(name) as report:
        for batch in (1, 3, 1):
            check(model, where.tokens(batch), max_new_tokens=6)
    # 5 tokens after the prompt's, 2 of them before a batch's graphs; the third time there are.
    assert replays(report) == 2 * (3 + 3 + 5) and not reasons(report)


@pytest.mark.parametrize("name", sorted(UNCUT & {*having("add_rms_norm")}))
def test_a_layer_that_cannot_be_cut_says_why(name: str, where: Where) -> None:
    model = where.model(name)
    with where.patched(name) as report:
        check(model, where.tokens())
    (reason,) = reasons(report)
    assert not replays(report)
    assert "is called inside of other code" in reason or "0 attention interfaces" in reason


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_weights_of_attention_a_window_and_beams(name: str, where: Where) -> None:
    model = where.model(name, attn_implementation="eager", sliding_window=6)
    with where.patched(name) as report:
        check(model, where.tokens())
        check(model, where.tokens(), num_beams=3)
    assert replays(report) > 2 * 9 and not reasons(report)
    with where.patched(name):
        check(model, where.tokens(), output_attentions=True)


def decoded(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> list[torch.Tensor]:
    """The logits of a plain loop."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    given = {name: cache, "use_cache": True, **options}
    found = [model(ids, **given).logits]
    for _ in range(6):
        found.append(model(found[-1][:, -1:].argmax(-1), **given).logits)
    return found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_plain_loop_of_one_patched_model(name: str, mode: Any, where: Where) -> None:
    model, other = where.model(name), where.model(name)
    chosen = where.kernels(name)
    hf_kernel_patch.apply_default_kernels(model, chosen if chosen == "auto" else ",".join(chosen))
    with mode():
        plain = without_graphs(lambda: decoded(model, where.tokens(), DynamicCache()))
        assert all(map(torch.equal, decoded(model, where.tokens(), DynamicCache()), plain))
        decoded(other, where.tokens(), DynamicCache())
    assert replays(hf_kernel_patch.status()) == 2 * 4
    hf_kernel_patch.unpatch(model)


def test_a_hook_inside_sends_the_layer_back_and_is_named(where: Where) -> None:
    model, calls = where.model("llama"), list[int]()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *args: calls.append(1))
    with where.patched("llama") as report:
        generated(model, where.tokens())
    assert len(calls) == 2 * 12 and not replays(report)
    assert reasons(report) == {"a hook on LlamaMLP needs the original"}


def test_what_is_no_decoding_is_not_replayed(where: Where) -> None:
    model, ids = where.model("llama"), where.tokens()
    with where.patched("llama") as report:
        decoded(model, ids, DynamicCache())  # with gradients
        with torch.autocast(where.device, torch.bfloat16), torch.no_grad():
            decoded(model, ids, DynamicCache())
        with torch.no_grad():
            model.train()
            decoded(model, ids, DynamicCache())
            model.eval()
            without_graphs(lambda: decoded(model, ids, DynamicCache()))
            for _ in range(4):
                model(ids)
    assert not replays(report) and not reasons(report)


def test_torch_compile_sees_nothing_of_it(where: Where) -> None:
    model = where.model("llama")
    layer, x = model.model.layers[0], torch.randn(2, 1, 64).to(where.device, where.dtype)
    angles = model.model.rotary_emb(x, torch.arange(1, device=where.device)[None])
    with hf_kernel_patch.patched("add_rms_norm", models="llama") as report, torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        for _ in range(4):
            found = compiled(x, position_embeddings=angles)
    assert not replays(report) and not reasons(report)
    torch.testing.assert_close(found, layer(x, position_embeddings=angles))


def test_weights_changed_in_place_are_seen_and_moved_ones_too(where: Where) -> None:
    model = where.model("llama")
    with where.patched("llama") as report:
        generated(model, where.tokens())
        for change in (
            lambda p: p.mul_(1.5),
            lambda p: setattr(p, "data", p.data.roll(1).clone()),
        ):
            with torch.no_grad():
                change(model.model.layers[0].mlp.up_proj.weight)
            check(model, where.tokens())
    assert replays(report) == 2 * (9 + 11 + 11) and not reasons(report)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="generate of 4 compiles with a static cache")
def test_a_static_cache(where: Where) -> None:
    model = where.model("llama")
    with where.patched("llama") as report:
        check(model, where.tokens(), cache_implementation="static", disable_compile=True)
    assert replays(report) == 2 * 9


def test_the_mlp_stays_outside_where_it_cannot_be_captured(where: Where) -> None:
    if where.device != "cpu":
        pytest.skip("the stand-in fails where it is told to")

    def fails(function: Any, count: int) -> None:
        if count % 3 == 2:  # before, whole, without the MLP
            raise RuntimeError("experts ask the device")

    where.graphs.fails = fails
    model = where.model("qwen3_moe")
    with where.patched("qwen3_moe") as report:
        check(model, where.tokens())
    assert replays(report) == 2 * 9 and not reasons(report) and where.graphs.count == 2 * 3


@pytest.mark.parametrize("place", [1, 2])
def test_a_capture_that_fails_leaves_the_call_right(place: int, where: Where) -> None:
    if where.device != "cpu":
        pytest.skip("the stand-in fails where it is told to")

    def fails(function: Any, count: int) -> None:
        if count >= place:
            raise RuntimeError("no graph today\nnor tomorrow")

    where.graphs.fails = fails
    model = where.model("llama")
    with where.patched("llama") as report:
        check(model, where.tokens())
    assert reasons(report) == {"RuntimeError: no graph today"} and not replays(report)


def test_the_text_keeps_its_lines_and_others_have_no_entry(where: Where) -> None:
    kind = modelling("llama").LlamaDecoderLayer
    before = inspect.signature(kind.forward), inspect.getsourcelines(innermost_of(kind.forward))
    with where.patched("llama"):
        running = inspect.unwrap(kind.forward)
        text, line = inspect.getsourcelines(running)
        assert "decode" in running.__code__.co_freevars
        assert (inspect.signature(kind.forward), line) == (before[0], before[1][1])
        assert len(text) == len(before[1][0]) and text[-1] == before[1][0][-1]
    with hf_kernel_patch.patched("torch_fused_add_rmsnorm", models="llama"):
        assert "decode" not in inspect.unwrap(kind.forward).__code__.co_freevars


class TestFreed:
    """The stand-in holds the layer that it runs, so these ask a GPU."""

    pytestmark = gpu

    def test_unpatch_frees_the_graphs(self) -> None:
        model = tiny_model("llama", torch.bfloat16).cuda().eval()
        with hf_kernel_patch.patched("auto", models="llama") as report:
            generated(model, tokens(1, 9).cuda())
            assert replays(report), counts(report)
            found = [weakref.ref(g) for g in gc.get_objects() if type(g) is decoding._Layer]
            assert len(found) == 2
        gc.collect()
        assert not any(reference() for reference in found)

    def test_a_deleted_model_takes_its_graphs_along(self) -> None:
        model = tiny_model("llama", torch.bfloat16).cuda().eval()
        with hf_kernel_patch.patched("auto", models="llama"):
            generated(model, tokens(1, 9).cuda())
            weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
            del model
            gc.collect()
            assert weight() is None
