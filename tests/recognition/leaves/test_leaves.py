"""What the replacements compute, and how they look."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch.patching.lookup import locate
from hf_kernel_patch.recognition import Site, build
from hf_kernel_patch.registry import kernels
from tests.recognition.leaves.rope_inputs import ROPE, rope_inputs
from tests.support.tiny import (
    ARCHITECTURES,
    ROWS,
    TRANSFORMERS_5,
    largest_error,
    layer_ops_of,
    modelling,
    ops_of,
    outputs_and_gradients,
    tiny_model,
    tokens,
)

EXACT_OPS = ("rms_norm", "rope", "swiglu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_bit_for_bit_those_of_eager_without_the_experts(
    name: str, dtype: torch.dtype
) -> None:
    model = tiny_model(name, dtype)
    ops = tuple(op for op in layer_ops_of(name) if op in EXACT_OPS)
    with torch.no_grad():
        eager = model(tokens()).logits
        with hf_kernel_patch.patched(ops, models=name, strict=True) as report:
            assert torch.equal(model(tokens()).logits, eager)
    assert all(row.served for row in report if row.site.endswith("Norm.forward"))
    rotary = [row.served for row in report if row.op == "rope"]
    assert any(rotary) or not rotary  # of DeepSeek-V3's two the config chooses one
    assert not any(row.fallbacks for row in report)


# (arguments after sin, keyword arguments, where the heads are), in the signature of each version.
ROPE_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], int]] = {
    "the default": ((), {}, 1),
    "1 by name": ((), {"unsqueeze_dim": 1}, 1),
    "2 by name": ((), {"unsqueeze_dim": 2}, 2),
    **(
        {"1 by position": ((1,), {}, 1), "2 by position": ((2,), {}, 2)}
        if TRANSFORMERS_5
        else {
            "positions by position": ((torch.arange(5),), {}, 1),
            "positions by name": ((), {"position_ids": torch.arange(5), "unsqueeze_dim": 2}, 2),
            "2 by position": ((None, 2), {}, 2),
        }
    ),
}


@pytest.mark.parametrize("call", ROPE_CALLS)
@pytest.mark.parametrize("name", ROPE)
def test_the_rotary_function_takes_the_signature_of_its_transformers(name: str, call: str) -> None:
    module = modelling(name)
    arguments, options, heads_at = ROPE_CALLS[call]
    inputs = rope_inputs(name, heads_at)
    expected = module.apply_rotary_pos_emb(*inputs, *arguments, **options)
    with hf_kernel_patch.patched("rope", models=name, strict=True) as report:
        found = module.apply_rotary_pos_emb(*inputs, *arguments, **options)
        by_name = dict(zip(("q", "k", "cos", "sin"), inputs, strict=True))
        named = module.apply_rotary_pos_emb(**by_name, unsqueeze_dim=heads_at)
    assert isinstance(found, tuple)
    for one, other, third in zip(found, named, expected, strict=True):
        assert torch.equal(one, third)
        assert torch.equal(other, third)
    assert [row.served for row in report] == [2]


@pytest.mark.parametrize("name", ["llama", "granite", "gemma", "phi3"])
def test_biased_projections_are_kept(name: str) -> None:
    model = tiny_model(name, mlp_bias=True)
    eager = outputs_and_gradients(model)
    with hf_kernel_patch.patched("swiglu", models=name, strict=True):
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n in ("mixtral", "qwen2_moe")])
def test_the_router_sees_the_same_and_jitter_draws_the_same(name: str) -> None:
    model = tiny_model(name, router_jitter_noise=0.1, output_router_logits=True).train()

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return outputs_and_gradients(model)

    eager = run()
    with hf_kernel_patch.patched("moe", models=name, strict=True):
        assert largest_error(run(), eager) < 3e-6


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_autocast_gives_what_it_gives_in_eager(name: str) -> None:
    model = tiny_model(name)
    truth = outputs_and_gradients(model)

    def run() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return outputs_and_gradients(model)

    eager = run()
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True):
        inside = run()
    assert inside["logits"].dtype is eager["logits"].dtype
    assert largest_error(inside, truth) <= 1.1 * largest_error(eager, truth)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    eager = outputs_and_gradients(model)
    with hf_kernel_patch.patched(layer_ops_of("llama"), models="llama", strict=True):
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6


# -- the replacement as an object


@pytest.mark.parametrize(
    ("name", "spec"), ROWS, ids=[f"{name}-{spec.qualname}" for name, spec in ROWS]
)
def test_a_replacement_looks_like_the_original(name: str, spec: Any) -> None:
    modelling(name)
    original = locate(spec)[2]
    with hf_kernel_patch.patched(ops_of(name), models=name, strict=True):
        ours = locate(spec)[2]
    assert ours is not original
    assert inspect.signature(ours) == inspect.signature(original)
    assert ours.__name__ == spec.qualname.rpartition(".")[2]
    if inspect.isfunction(original):  # and not the module object that ``kernels`` makes of it
        for attribute in ("__qualname__", "__module__", "__doc__"):
            assert getattr(ours, attribute) == getattr(original, attribute)


def test_a_replacement_that_somebody_kept_runs_the_original_afterwards() -> None:
    norm, x = modelling("llama").LlamaRMSNorm(8), torch.randn(3, 8)
    with hf_kernel_patch.patched("rms_norm", models="llama", strict=True) as report:
        kept = norm.forward
        kept(x)
    assert torch.equal(kept(x), norm(x))
    assert [row.served for row in report] == [1]
    assert kept.__func__ is not type(norm).forward


def test_a_report_counts_the_calls_of_its_own_patch() -> None:
    norm, x = modelling("llama").LlamaRMSNorm(8), torch.randn(3, 8)
    for _ in range(2):
        with hf_kernel_patch.patched("rms_norm", models="llama", strict=True) as report:
            norm(x)
        assert [row.served for row in report] == [1]


def test_an_adapter_with_other_parameters_is_an_error() -> None:
    norm = modelling("llama").LlamaRMSNorm
    site = Site(kernels()["torch_fused_rmsnorm"], norm.forward, explicit=True)

    def adapter(site: Site) -> Callable[..., Any]:
        return lambda self, x, eps: x

    with pytest.raises(TypeError, match="but the original takes"):
        build(adapter, site)
    free = build(lambda site: lambda *args, **kwargs: args, site)
    assert free.__qualname__ == "LlamaRMSNorm.forward"
