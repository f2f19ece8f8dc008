"""Layers and attentions that are written in other orders than Llama's and Qwen3's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.models import architectures
from tests.recognition.rules.layer_families import HERE, expected, model_of, table_of
from tests.support.tiny import (
    TRANSFORMERS_5,
    error,
    largest_error,
    outputs_and_gradients,
    tokens,
)

ADD, HEADS = "torch_fused_add_rmsnorm", "torch_fused_qk_norm_rope"


@pytest.fixture
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a family whose table is there for the test."""
    name: str = request.param
    monkeypatch.setitem(architectures(), name, table_of(name))
    return name


def patched(name: str) -> Any:
    rows = architectures()[name].sites
    kernels = {"residual_norm": ADD, "qk_norm_rope": HEADS}
    return hf_kernel_patch.patched([kernels[row.code] for row in rows], models=name, strict=True)


def served(report: Any) -> dict[str, int]:
    """op -> calls that were served; there were no others."""
    assert not any(row.fallbacks for row in report), report
    return {row.op: row.served for row in report}


def test_there_are_families_here() -> None:
    assert len(HERE) >= 4


@pytest.mark.parametrize("table", HERE, indirect=True)
def test_a_training_step_agrees(table: str) -> None:
    model = model_of(table).train()
    eager = outputs_and_gradients(model)
    with patched(table) as report:
        inside = outputs_and_gradients(model)
        assert served(report) == expected(table, model)
    assert largest_error(inside, eager) < 3e-6
    assert largest_error(outputs_and_gradients(model), eager) == 0


@pytest.mark.parametrize("table", HERE, indirect=True)
def test_a_training_step_with_checkpoints_agrees(table: str) -> None:
    model = model_of(table).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip("it has no checkpoints")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    eager = outputs_and_gradients(model)
    with patched(table) as report:
        inside = outputs_and_gradients(model)
        assert served(report) == expected(table, model, times=2)
    assert largest_error(inside, eager) < 3e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("table", HERE, indirect=True)
def test_it_is_bit_for_bit_the_original_s(table: str, dtype: torch.dtype) -> None:
    model = model_of(table, dtype).eval()
    eager = model(tokens()).logits
    with patched(table) as report:
        assert torch.equal(model(tokens()).logits, eager)
        assert served(report) == expected(table, model)


@pytest.mark.parametrize("table", HERE, indirect=True)
def test_half_precision_is_no_further_from_the_truth_than_eager(table: str) -> None:
    model = model_of(table, torch.bfloat16)
    eager = outputs_and_gradients(model)
    with patched(table):
        inside = outputs_and_gradients(model)
    model.config._experts_implementation = "eager"  # the grouped products take no float64
    # In transformers 4 these blocks add what they weighted in float32 to what they are given.
    wide = torch.float32 if table == "glm4_moe" and not TRANSFORMERS_5 else torch.float64
    truth = outputs_and_gradients(model.to(wide))
    assert error(inside["logits"], truth["logits"]) <= 1.1 * error(eager["logits"], truth["logits"])
    inside_errors = [error(inside[key], truth[key]) for key in truth]
    eager_errors = [error(eager[key], truth[key]) for key in truth]
    assert sum(inside_errors) <= 1.1 * sum(eager_errors)


@pytest.mark.parametrize("table", HERE, indirect=True)
def test_generate_gives_the_same_tokens(table: str) -> None:
    model = model_of(table).eval()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(tokens(), **options)
    with patched(table):
        assert torch.equal(model.generate(tokens(), **options), eager)


@torch.no_grad()
@pytest.mark.parametrize(
    "table", [n for n in HERE if n in ("exaone4", "gemma3_text")], indirect=True
)
@pytest.mark.parametrize("traceable", [False, True])
def test_it_compiles_in_one_graph(
    table: str, traceable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    for kernel in (ADD, HEADS):
        monkeypatch.setattr(registry.kernels()[kernel], "traceable", traceable)
    model = model_of(table).eval()
    eager = model(tokens(), use_cache=False).logits
    with patched(table) as report:
        fast = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(fast(tokens(), use_cache=False).logits, eager)
        calls = sum(row.served for row in report)
        assert calls == (sum(expected(table, model).values()) if traceable else 0)
    torch._dynamo.reset()


@pytest.mark.parametrize("table", [n for n in HERE if n == "glm4_moe"], indirect=True)
def test_norms_that_are_not_asked_for_are_not_there(table: str) -> None:
    model = model_of(table, use_qk_norm=False).train()
    assert not hasattr(model.model.layers[0].self_attn, "q_norm")
    eager = outputs_and_gradients(model)
    with patched(table) as report:
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
        (row,) = [one for one in report if one.op == "qk_norm_rope"]
        assert row.fallbacks == {"the norms of q and k are not asked for": 2}
        assert row.served == 0


@pytest.mark.parametrize(
    "table", [n for n in HERE if n in ("afmoe", "exaone4", "gemma3_text")], indirect=True
)
def test_a_hook_on_a_norm_sees_what_it_always_sees(table: str) -> None:
    """On layers that are rotated and on those that are not."""
    model = model_of(table).eval()
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def hook(module: Any, given: Any, output: Any) -> Any:
        seen.append((module.name, given[0].detach(), output.detach()))
        return output * 2

    for layer in model.model.layers:
        for name in ("q_norm", "k_norm"):
            norm = getattr(layer.self_attn, name)
            norm.name = name
            norm.register_forward_hook(hook)
    eager, before = model(tokens()).logits, seen[:]
    seen.clear()
    with patched(table) as report:
        assert torch.equal(model(tokens()).logits, eager)
        (row,) = [one for one in report if one.op == "qk_norm_rope"]
        assert set(row.fallbacks) == {"a hook on the norm needs the original"}
    assert [name for name, *_ in seen] == [name for name, *_ in before] == ["q_norm", "k_norm"] * 2
    for (_, *found), (_, *wanted) in zip(seen, before):
        assert all(map(torch.equal, found, wanted))
        assert [x.stride() for x in found] == [x.stride() for x in wanted]
