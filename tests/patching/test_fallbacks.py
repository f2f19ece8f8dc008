"""What a replacement cannot serve goes to the original, and the report says why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import hf_kernel_patch
from tests.support.probes import LAYERS, MOE, changed, fallbacks, llama, logits, places, served
from tests.support.tiny import (
    TRANSFORMERS_5,
    largest_error,
    layer_ops_of,
    modelling,
    outputs_and_gradients,
    tiny_model,
    tokens,
)

Function = Callable[[torch.Tensor], torch.Tensor]
OPS = ("rms_norm", "rope", "swiglu")
PATCH = {"models": ("llama", "qwen3_moe"), "strict": True}


@pytest.fixture(autouse=True)
def counted_and_left_as_before() -> Iterator[None]:
    for name in PATCH["models"]:
        modelling(name)
    before = places()
    hf_kernel_patch.count_calls()
    yield
    assert changed(before) == set()


def function_of(op: str) -> Function:
    """A function of x (..., 5, 8) that calls the op's place in Llama or Qwen3-MoE once."""
    if op == "rope":
        cos, sin = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))

        def rotate(x: torch.Tensor) -> torch.Tensor:
            # The rotary function is given (batch, heads, length, width).
            wide = x.reshape(-1, 1, 5, 8)
            q, k = llama().apply_rotary_pos_emb(wide, wide * 2, cos[None], sin[None])
            return (q + k).reshape(x.shape)

        return rotate
    name = "qwen3_moe" if op == "moe" else "llama"
    model = tiny_model(name, hidden_size=8).model
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if op == "rms_norm":
        return model.norm
    block = model.layers[0].mlp
    if op == "swiglu":
        return block

    def route(x: torch.Tensor) -> torch.Tensor:
        output = block(x.reshape(1, -1, 8))
        return (output[0] if isinstance(output, tuple) else output).reshape(x.shape)

    return route


def x_like(*shape: int) -> torch.Tensor:
    """(*shape, 5, 8), always the same numbers."""
    return torch.randn(*shape, 5, 8, generator=torch.Generator().manual_seed(1))


def dual(function: Function, x: torch.Tensor) -> torch.Tensor:
    """The directional derivative by dual numbers."""
    with forward_ad.dual_level():
        output = function(forward_ad.make_dual(x, torch.ones_like(x)))
        return forward_ad.unpack_dual(output).tangent


TRANSFORMS: dict[str, tuple[Callable[[Function, torch.Tensor], torch.Tensor], str]] = {
    "vmap": (lambda f, x: torch.func.vmap(f)(x), "torch.func"),
    "grad": (lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x), "torch.func"),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1], "torch.func"),
    "vjp": (lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0], "torch.func"),
    "hessian": (
        lambda f, x: torch.func.hessian(lambda y: f(y).square().sum())(x[0]),
        "torch.func",
    ),
    "dual numbers": (dual, "forward-mode"),
    "jit.trace": (lambda f, x: torch.jit.trace(f, x)(x), "torch.jit.trace"),
    "make_fx": (lambda f, x: make_fx(lambda y: f(y))(x)(x), "make_fx"),
    "float64": (lambda f, x: f(x.double()), "float64"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_gives_the_original_s_result_and_the_reason(transform: str, op: str) -> None:
    function, x = function_of(op), x_like(3)
    if transform == "float64" and isinstance(function, torch.nn.Module):
        function = function.double()
    run, reason = TRANSFORMS[transform]
    eager = run(function, x)
    with hf_kernel_patch.patched(op, **PATCH) as report:
        assert torch.equal(run(function, x), eager)
        reasons = fallbacks(report)
        assert reasons.total() >= 1
        assert all(reason in found for found in reasons)
    assert torch.equal(run(function, x), eager)


class Tagged(torch.Tensor):
    """A subclass as libraries for sharding and quantising make them."""


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_subclass_goes_to_the_original_and_stays_one(op: str) -> None:
    function, x = function_of(op), x_like(3).as_subclass(Tagged)
    eager = function(x)
    with hf_kernel_patch.patched(op, **PATCH) as report:
        found = function(x)
        assert type(found) is type(eager) is Tagged
        assert torch.equal(found.as_subclass(torch.Tensor), eager.as_subclass(torch.Tensor))
        assert set(fallbacks(report)) == {"a tensor is a Tagged"}
        assert served(report) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_traced_graph_is_the_original_s_and_outlives_the_patch() -> None:
    norm, x = llama().LlamaRMSNorm(8), x_like()
    plain = str(torch.jit.trace(norm, x).graph)
    with hf_kernel_patch.patched("rms_norm", **PATCH):
        traced = torch.jit.trace(norm, x)
    assert re.sub(r"mangle_\d+", "", str(traced.graph)) == re.sub(r"mangle_\d+", "", plain)
    assert torch.equal(traced(x), norm(x))


def two_orders(function: Function, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of x and the gradients of its square, a gradient penalty."""
    x = x.clone().requires_grad_()
    first = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]
    first.square().sum().backward()
    found = {"first": first.detach(), "second": x.grad}
    if isinstance(function, torch.nn.Module):
        found |= {name: p.grad.clone() for name, p in function.named_parameters()}
        function.zero_grad()
    return found


@pytest.mark.parametrize("op", [*OPS, "moe"])
def test_double_backward_agrees_with_the_original(op: str) -> None:
    """The inputs of an op depend on each other: k on q, routing weights on hidden states."""
    function, x = function_of(op), x_like(3)
    eager = two_orders(function, x)
    assert all(tensor.norm() > 0 for tensor in eager.values())
    with hf_kernel_patch.patched(op, **PATCH) as report:
        assert largest_error(two_orders(function, x), eager) < 1e-5
        assert served(report) == 1


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_gradient_penalty_of_a_whole_model_agrees(name: str) -> None:
    model = tiny_model(name, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)

    def penalty() -> dict[str, torch.Tensor]:
        model.zero_grad()
        embedded = model.model.embed_tokens(tokens()).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=tokens()).loss
        torch.autograd.grad(loss, embedded, create_graph=True)[0].square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    eager = penalty()
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True):
        assert largest_error(penalty(), eager) < 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_both_kinds(name: str, reentrant: bool) -> None:
    model = tiny_model(name).train()
    plain = outputs_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    eager = outputs_and_gradients(model)
    assert largest_error(eager, plain) == 0
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True) as report:
        assert largest_error(outputs_and_gradients(model), eager) < 3e-6
        norms = sum(row.served for row in report if "norm" in row.op)
        last = 1  # outside of the layers, so not computed again
        assert (norms - last) % 2 == 0 and norms >= 9
        assert not fallbacks(report)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_float64_model_is_the_original_s_bit_for_bit(name: str) -> None:
    model = tiny_model(name).double()
    if TRANSFORMERS_5:
        model.config._experts_implementation = "eager"  # the grouped products take no float64
    eager = outputs_and_gradients(model)
    with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True) as report:
        assert largest_error(outputs_and_gradients(model), eager) == 0
        assert served(report) == 0
        assert set(fallbacks(report)) == {"a tensor is float64"}


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_autocast_agrees(name: str) -> None:
    model = tiny_model(name)
    with torch.autocast("cpu", torch.bfloat16):
        eager = logits(model)
        with hf_kernel_patch.patched(layer_ops_of(name), models=name, strict=True) as report:
            inside = logits(model)
            assert served(report) >= 5
    assert inside.dtype == eager.dtype
    torch.testing.assert_close(inside, eager, rtol=2e-2, atol=2e-2)


def test_inference_mode_and_frozen_parameters() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        eager = model(tokens()).logits
        with hf_kernel_patch.patched(LAYERS, models="llama", strict=True) as report:
            assert torch.equal(model(tokens()).logits, eager)
            assert served(report) == 9
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name or "embed" in name)
    eager_gradients = outputs_and_gradients(model)
    with hf_kernel_patch.patched(LAYERS, models="llama", strict=True):
        assert largest_error(outputs_and_gradients(model), eager_gradients) < 3e-6


def test_functional_call_with_other_parameters() -> None:
    model = tiny_model("llama")
    others = {name: value.detach() * 1.1 for name, value in model.named_parameters()}

    def call() -> torch.Tensor:
        return torch.func.functional_call(model, others, (tokens(),)).logits

    with torch.no_grad():
        eager = call()
        with hf_kernel_patch.patched(LAYERS, models="llama", strict=True) as report:
            assert torch.equal(call(), eager)
            assert served(report) == 9


def test_experts_under_a_transform_are_the_original_s() -> None:
    function, x = function_of("moe"), x_like(2)
    gradient = torch.func.grad(lambda y: function(y).square().sum())
    try:
        eager = gradient(x)
    except RuntimeError as error:
        pytest.skip(f"the original does not work under torch.func either: {error}")
    with hf_kernel_patch.patched(MOE, models="qwen3_moe", strict=True) as report:
        assert torch.equal(gradient(x), eager)
        assert set(fallbacks(report)) == {"a torch.func transform is active"}


def test_torch_fx_traces_the_original() -> None:
    model = tiny_model("llama").eval()
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    x = torch.randn(2, 3, 64)
    for module in (norm, mlp):
        eager = module(x)
        with hf_kernel_patch.patched("rms_norm,swiglu", models="llama", strict=True):
            traced = torch.fx.symbolic_trace(module)
            assert torch.equal(traced(x), eager)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["nested", "sparse", "mkldnn"])
def test_other_layouts_run_the_original_or_fail_as_it_does(name: str) -> None:
    model = tiny_model("llama").eval()
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    rows = [torch.randn(3, 64), torch.randn(3, 64)]
    x = {
        "nested": lambda: torch.nested.nested_tensor(rows),
        "sparse": lambda: rows[0].to_sparse(),
        "mkldnn": lambda: rows[0].to_mkldnn(),
    }[name]()

    def outcome(module: Any) -> str:
        try:
            with torch.no_grad():
                found = module(x)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:60]}"
        parts = found.unbind() if found.is_nested else [found.to_dense()]
        return str([part.double().sum().item() for part in parts])

    for module in (norm, mlp):
        eager = outcome(module)
        with hf_kernel_patch.patched("rms_norm,swiglu", models="llama", strict=True):
            assert outcome(module) == eager
