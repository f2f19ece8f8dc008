"""torch.compile sees the original through a replacement: one graph, no break, no recompilation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import registry
from tests.support.probes import LAYERS, changed, fallbacks, llama, places, served
from tests.support.tiny import TRANSFORMERS_5, modelling, ops_of, tiny_model, tokens

WHY = "torch.compile fuses the original itself"
#: Models that compile as one graph; in transformers 4 a list of experts does not.
WHOLE = ["llama", "qwen3_moe"] if TRANSFORMERS_5 else ["llama", "qwen3"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    modelling("llama")
    before = places()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert changed(before) == set()


def compiled(function: Any) -> Any:
    """In one graph, run by PyTorch itself."""
    return torch.compile(function, fullgraph=True, backend="eager")


@torch.no_grad()
def test_a_whole_model_compiles_in_one_graph_inside_and_after() -> None:
    model = tiny_model("llama", num_hidden_layers=1).eval()
    eager = model(tokens(), use_cache=False).logits
    fast = compiled(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo detected")
        with hf_kernel_patch.patched(LAYERS, models="llama", strict=True):
            assert torch.equal(fast(tokens(), use_cache=False).logits, eager)
    assert torch.equal(fast(tokens(), use_cache=False).logits, eager)


def test_counting_costs_no_recompilation() -> None:
    norm, x = llama().LlamaRMSNorm(8), torch.randn(4, 8)
    eager = norm(x)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("rms_norm", models="llama", strict=True) as report:
        fast = compiled(norm)
        for _ in range(12):  # more than the compiler puts up with
            assert torch.equal(fast(x), eager)
        assert served(report) == 0
        assert set(fallbacks(report)) <= {WHY}
        norm(x)
        assert served(report) == 1


def test_patching_again_and_again_costs_no_recompilation() -> None:
    norm, x = llama().LlamaRMSNorm(8), torch.randn(4, 8)
    eager, graphs = norm(x), 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    fast = torch.compile(norm, fullgraph=True, backend=count)
    for _ in range(12):
        with hf_kernel_patch.patched("rms_norm", models="llama", strict=True):
            assert torch.equal(fast(x), eager)
        assert torch.equal(fast(x), eager)
    assert graphs <= 2


def test_gradients_of_a_compiled_module_agree() -> None:
    mlp = tiny_model("llama", num_hidden_layers=1).model.layers[0].mlp
    x = torch.randn(3, 64, requires_grad=True)
    eager = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
    with hf_kernel_patch.patched("swiglu", models="llama", strict=True):
        inside = torch.autograd.grad(compiled(mlp)(x).square().sum(), [x, *mlp.parameters()])
    for left, right in zip(inside, eager, strict=True):
        assert torch.equal(left, right)


@torch.no_grad()
@pytest.mark.parametrize("traceable", [False, True])
def test_whole_layers_compile_in_one_graph(
    traceable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = registry.kernels()
    for name in ("torch_fused_add_rmsnorm", "torch_fused_qk_norm_rope"):
        monkeypatch.setattr(kernels[name], "traceable", traceable)
    model = tiny_model("qwen3", num_hidden_layers=1).eval()
    eager = model(tokens(), use_cache=False).logits
    hf_kernel_patch.count_calls()
    ops = "torch_fused_add_rmsnorm,torch_fused_qk_norm_rope"
    with hf_kernel_patch.patched(ops, models="qwen3", strict=True) as report:
        torch.testing.assert_close(compiled(model)(tokens(), use_cache=False).logits, eager)
    assert served(report) == 0 or traceable
    assert not traceable or not fallbacks(report)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("scope", ["global", "one model"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_counted_model_is_one_graph_however_often_it_is_called(
    name: str, scope: str, train: bool
) -> None:
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    model = tiny_model(name).train(train)
    hf_kernel_patch.count_calls()
    if scope == "global":
        hf_kernel_patch.patch_transformers(ops_of(name), models=name, backend="torch")
    else:
        for op in ops_of(name):
            kernel = registry.select((op,), backend="torch")[op]
            hf_kernel_patch.apply_kernel(kernel.kernel_id, model=model)
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend=count)
    options: dict[str, Any] = {"labels": tokens()} if train else {}
    for _ in range(10):
        fast(tokens(), use_cache=False, **options)
    assert graphs == 1
    reasons = set(fallbacks(hf_kernel_patch.status()))
    hf_kernel_patch.unpatch()
    assert reasons == ({WHY} if train else {WHY, "no labels: there is no loss"})
