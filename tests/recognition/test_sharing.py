"""Equal requests share what is made for them; different ones come and go in any order."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from itertools import permutations
from types import FunctionType
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch.patching.model_patch import applications
from hf_kernel_patch.recognition.wrappers import innermost_of
from tests.support.probes import changed, logits, places
from tests.support.scope import close, kinds, same, state
from tests.support.tiny import modelling, ops_of, tiny_model, tokens

MODELS, CYCLES = 12, 20
OPS = "add_rms_norm,swiglu,rope"


def code_of(method: Any) -> Any:
    """The code under the wrappers, ours included."""
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method.__code__


def ours() -> set[int]:
    """Every code object of ours that some function alive has."""
    gc.collect()
    codes = (one.__code__ for one in gc.get_objects() if isinstance(one, FunctionType))
    return {id(code) for code in codes if "[hf_kernel_patch" in code.co_filename}


# -- many models


@pytest.fixture
def models() -> list[Any]:
    """Tiny models, each patched alone by an equal request."""
    made = [tiny_model("llama", num_hidden_layers=1).eval() for _ in range(MODELS)]
    for model in made:
        hf_kernel_patch.apply_default_kernels(model, OPS)
    return made


def test_models_with_equal_requests_share_functions_and_classes(models: list[Any]) -> None:
    original = tiny_model("llama", num_hidden_layers=1)
    kinds_of = {tuple(kinds(model)) for model in models}
    assert len(kinds_of) == 1
    patched = [kind for kind, plain in zip(kinds_of.pop(), kinds(original)) if kind is not plain]
    assert {kind.__name__ for kind in patched} == {
        "LlamaDecoderLayer",
        "LlamaMLP",
        "LlamaAttention",
    }
    for kind in patched:
        code = code_of(vars(kind)["forward"])
        assert "[hf_kernel_patch" in code.co_filename
        assert all(
            code_of(type(module).forward) is code
            for model in models
            for module in model.modules()
            if type(module).__name__ == kind.__name__
        )
    for model in models:
        hf_kernel_patch.unpatch(model)


@torch.no_grad()
def test_models_patched_alone_compile_without_end(models: list[Any]) -> None:
    # Counted calls belong to one model, and so does the code that counts them.
    hf_kernel_patch.count_calls(False)
    torch._dynamo.reset()
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    # Hitting the limit of recompilations raises, as fullgraph asks.
    eager = models[0](tokens(), use_cache=False).logits
    for model in models:
        fast = torch.compile(model, fullgraph=True, backend=count)
        close_to(fast(tokens(), use_cache=False).logits, eager)
    assert graphs <= 2
    torch._dynamo.reset()
    for model in models:
        hf_kernel_patch.unpatch(model)


def close_to(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_patching_again_and_again_leaves_no_code_behind() -> None:
    model = tiny_model("llama", num_hidden_layers=1).eval()

    def cycle() -> None:
        hf_kernel_patch.apply_default_kernels(model, OPS)
        logits(model)
        hf_kernel_patch.unpatch(model)
        with hf_kernel_patch.patched(OPS, models="llama", strict=True):
            logits(model)

    cycle()
    before = ours()
    assert before
    for _ in range(CYCLES):
        cycle()
    assert ours() == before


def test_different_requests_have_code_of_their_own() -> None:
    """The limit of recompilations is one of code objects."""
    found = []
    for ops in ("swiglu", "add_rms_norm", "add_rms_norm,swiglu"):
        model = tiny_model("llama", num_hidden_layers=1)
        hf_kernel_patch.apply_default_kernels(model, ops)
        layer = model.model.layers[0]
        found.append((code_of(type(layer).forward), code_of(type(layer.mlp).forward)))
        hf_kernel_patch.unpatch(model)
    (plain, mlp), (layer, plain_mlp), both = found
    assert both == (layer, mlp)
    assert len({plain, layer}) == len({mlp, plain_mlp}) == 2


# -- nested, in all orders


def three_ops(name: str) -> list[str]:
    """Ops that meet in Gemma2's layer, or in Qwen3's attention."""
    wanted = {
        "gemma2": ("add_rms_norm", "swiglu", "rms_norm", "rope"),
        "qwen3": ("rope", "qk_norm_rope", "rms_norm"),
    }
    return [op for op in wanted[name] if op in ops_of(name)][:3]


def expected(active: set[str]) -> set[str]:
    """The ops that are served; the norms and the rotary of q and k take the rotary's place."""
    return active - {"rope"} if "qk_norm_rope" in active else active


ORDERS = [(one, other) for one in permutations(range(3)) for other in permutations(range(3))]


@pytest.fixture(params=["gemma2", "qwen3"])
def architecture(request: pytest.FixtureRequest) -> Iterator[str]:
    """An architecture whose originals are back at the end."""
    modelling(request.param)
    before = places()
    yield request.param
    assert changed(before) == set()


def in_order(
    name: str,
    orders: tuple[tuple[int, ...], tuple[int, ...]],
    model: Any,
    enter: Callable[[str], tuple[Callable[[], int], Callable[[], None]]],
) -> None:
    """Enter and leave; after each step the ops in force are served, and no other.

    ``enter(op)`` gives what tells the calls that were served, and what leaves.
    """
    ops, eager = three_ops(name), logits(model)
    entered: dict[str, tuple[Callable[[], int], Callable[[], None]]] = {}
    active: set[str] = set()

    def check() -> None:
        before = {op: served() for op, (served, _) in entered.items()}
        close(model, eager)
        serving = {op for op, (served, _) in entered.items() if served() > before[op]}
        assert serving == expected(active), (sorted(active), orders)

    hf_kernel_patch.count_calls(True)
    for place in orders[0]:
        entered[ops[place]] = enter(ops[place])
        active.add(ops[place])
        check()
    for place in orders[1]:
        entered[ops[place]][1]()
        active.remove(ops[place])
        check()


@pytest.mark.parametrize("orders", ORDERS, ids=str)
def test_nested_blocks_in_all_orders(
    architecture: str, orders: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    def enter(op: str) -> Any:
        block = hf_kernel_patch.patched(op, models=architecture, strict=True)
        report = block.__enter__()
        return lambda: sum(row.served for row in report), lambda: block.__exit__(None, None, None)

    in_order(architecture, orders, tiny(architecture), enter)


@pytest.mark.parametrize("orders", ORDERS, ids=str)
def test_one_model_in_all_orders(
    architecture: str, orders: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    model, other = tiny(architecture), tiny(architecture)
    before = state(model)

    def enter(op: str) -> Any:
        hf_kernel_patch.apply_kernel(kernel_of(op), model=model)
        application = applications[-1]

        def leave() -> None:
            assert application.release() == []

        return lambda: sum(row.served for row in application.rows.values()), leave

    in_order(architecture, orders, model, enter)
    assert same(state(model), before)
    assert kinds(model) == kinds(other)
    assert not applications


@pytest.mark.parametrize("orders", ORDERS[::5], ids=str)
def test_a_model_and_all_models_in_all_orders(
    architecture: str, orders: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """The first op for one model alone, the others globally."""
    model = tiny(architecture)
    before = state(model)

    def enter(op: str) -> Any:
        if op == three_ops(architecture)[0]:
            hf_kernel_patch.apply_kernel(kernel_of(op), model=model)
            application = applications[-1]
            return (
                lambda: sum(row.served for row in application.rows.values()),
                lambda: application.release(),
            )
        block = hf_kernel_patch.patched(op, models=architecture, strict=True)
        report = block.__enter__()
        return lambda: sum(row.served for row in report), lambda: block.__exit__(None, None, None)

    in_order(architecture, orders, model, enter)
    assert same(state(model), before)


def tiny(name: str) -> Any:
    return tiny_model(name, num_hidden_layers=1).eval()


def kernel_of(op: str) -> str:
    """The op's kernel that PyTorch runs anywhere."""
    from hf_kernel_patch import registry

    return next(
        kernel.kernel_id
        for kernel in registry.kernels().values()
        if kernel.op == op and kernel.device == "any"
    )


def test_the_helpers_find_what_they_look_for() -> None:
    """Else the tests above would hold of anything."""
    assert len(ours()) == len(ours())
    model = tiny("llama")
    hf_kernel_patch.apply_default_kernels(model, OPS)
    method = type(model.model.layers[0]).forward
    assert innermost_of(method).__code__ is not code_of(method)
    assert id(code_of(method)) in ours()
    assert "add_rms_norm(" in inspect.getsource(code_of(method))
    hf_kernel_patch.unpatch(model)
