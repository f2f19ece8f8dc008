"""Linear layers of a token that run together: real models, LoRA, and calls not as recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from hf_kernel_patch.ops.decode_linear import reference
from hf_kernel_patch.ops.swiglu.reference import swiglu as plain_swiglu
from hf_kernel_patch.recognition.rules.decoding.products import Products
from tests.support.tiny import TRANSFORMERS_5, tiny_model


def swiglu(gate: Any, up: Any, activation: str = "silu") -> Any:
    """As a fused kernel that lets modes of torch see its calls."""
    if has_torch_function_variadic(gate, up):
        return handle_torch_function(swiglu, (gate, up), gate, up, activation)
    return plain_swiglu(gate, up, activation)


class Launches:
    """Products whose launches are counted, with the number of weights of each."""

    def __init__(self, pays: Callable[..., bool] = lambda rows, k, ns, dtype: True):
        self.weights: list[int] = []
        self.products = Products(self._linears, pays, self._gated, swiglu, device="cpu")

    def _linears(self, x: Any, weights: Sequence[Any], biases: Sequence[Any]) -> Any:
        self.weights.append(len(weights))
        return reference.linears(x, weights, biases)

    def _gated(self, *arguments: Any) -> Any:
        self.weights.append(2)
        return reference.gated(*arguments)

    @torch.no_grad()
    def check(self, run: Callable[[], Any], other: Callable[[], Any] | None = None) -> None:
        """The result of a run that is served is that of ``other``, or of the run itself."""
        with self.products.recorded():
            recorded = run()
        expected = recorded if other is None else other()
        for _ in range(2):
            self.weights.clear()
            with self.products.served():
                found = (other or run)()
            torch.testing.assert_close(found, expected)


def layers(count: int = 3, bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(8, 8, bias=bias and bool(i % 2)) for i in range(count)]


def token(model: Any) -> Callable[[], torch.Tensor]:
    ids = torch.tensor([[5], [7]])
    return lambda: model.eval()(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("llama", [3, 1, 2, 1] * 2 + [1]),
        ("qwen2", [3, 1, 2, 1] * 2 + [1]),  # with biases
        ("gpt2", [1]),  # only the head is an F.linear
    ],
)
def test_models(name: str, launches: list[int]) -> None:
    ours = Launches()
    ours.check(token(tiny_model(name)))
    assert ours.weights == launches


def test_experts_beside_a_router() -> None:
    model = tiny_model("qwen3_moe")
    model.config._experts_implementation = "eager"
    ours = Launches()
    ours.check(token(model))
    if TRANSFORMERS_5:
        # The experts' weights are slices of a parameter, which are left alone.
        assert ours.weights == [3, 1, 1] * 2 + [1]
    else:
        # Experts in a list have layers of their own: gate and up in one launch, then down.
        assert re.fullmatch("(311(21)+){2}1", "".join(map(str, ours.weights)))


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ours = Launches()
    ours.check(token(peft.get_peft_model(tiny_model("llama"), config)))
    # q, k, v and two times A are one launch.
    assert ours.weights == [5, 1, 1, 1, 2, 1] * 2 + [1]


def test_only_what_pays() -> None:
    asked = []

    def pays(rows: int, k: int, ns: Sequence[int], dtype: torch.dtype) -> bool:
        asked.append((rows, k, list(ns), dtype))
        return len(ns) == 3

    ours = Launches(pays)
    ours.check(token(tiny_model("llama")))
    assert ours.weights == [3, 3]
    assert (2, 64, [64, 32, 32], torch.float32) in asked


def test_more_weights_than_a_launch_takes() -> None:
    x, many = torch.randn(2, 8), layers(11)
    ours = Launches()
    ours.check(lambda: [layer(x) for layer in many])
    assert ours.weights == [8, 3]


def test_gate_up_and_product() -> None:
    x, (gate, up, q) = torch.randn(2, 8), layers()

    def run() -> Any:
        g, q_out, u = gate(x), q(x), up(x)
        return q_out, swiglu(g, u, "gelu"), g + u

    ours = Launches()
    ours.check(run)
    assert ours.weights == [2, 1]


@pytest.mark.parametrize("change", ["gate", "activation", "none served"])
def test_another_product_than_recorded(change: str) -> None:
    x, (gate, up, _) = torch.randn(2, 8), layers()

    def run(changed: bool = True) -> Any:
        g, u = gate(x), up(x)
        if changed and change == "gate":
            g.mul_(2)
        if changed and change == "none served":
            return u, g
        return swiglu(g, u, "gelu" if changed and change == "activation" else "silu")

    ours = Launches()
    ours.check(lambda: run(False), run)
    assert ours.weights == [2]


def test_a_factor_of_two_products() -> None:
    x, (gate, up, other) = torch.randn(2, 8), layers()

    def run() -> Any:
        g, u, o = gate(x), up(x), other(x)
        return swiglu(g, u), swiglu(g, o)

    ours = Launches()
    ours.check(run)
    assert ours.weights == [3]


def test_an_input_that_changes_between_the_calls() -> None:
    start, (q, k, v) = torch.randn(2, 8), layers()

    def run(changed: bool = False) -> Any:
        x = start.clone()
        found = [q(x)]
        if changed:
            x.mul_(2)
        return [*found, k(x), v(x)]

    ours = Launches()
    ours.check(run, lambda: run(True))
    assert ours.weights == [3]
    ours.check(lambda: run(True))
    assert ours.weights == [1, 2]


def test_another_shape_than_recorded() -> None:
    small, large, (q, k, v) = torch.randn(2, 8), torch.randn(3, 8), layers()

    def run(x: Any) -> Any:
        return [q(x), k(x), v(x)]

    ours = Launches()
    ours.check(lambda: run(small), lambda: run(large))
    assert ours.weights == []


def test_calls_that_do_not_come_or_come_in_another_order() -> None:
    x, y, (q, k, v) = torch.randn(2, 8), torch.randn(2, 8), layers()
    other = nn.Linear(8, 8)

    def recorded() -> Any:
        return [q(x), k(x), v(x), other(y)]

    for run, launches in (
        (lambda: [q(x), other(y)], [3, 1]),
        (lambda: [k(x), q(x), v(x), other(y)], [1]),
        (lambda: [other(x), q(x)], [1]),
        (lambda: [q(x), k(y), v(x)], [3]),
        (lambda: [v(y), q(x)], []),
    ):
        ours = Launches()
        ours.check(recorded, run)
        assert ours.weights == launches


def test_a_layer_that_runs_twice() -> None:
    x, (q, k, _) = torch.randn(2, 8), layers()

    def run() -> Any:
        first = q(x) + k(x)
        return q(first) * k(first)

    ours = Launches()
    ours.check(run)
    assert ours.weights == [2, 2]


def test_weights_that_a_run_writes_are_left_alone() -> None:
    x, (q, k, _) = torch.randn(2, 8), layers()

    def run() -> Any:
        k.weight.copy_(q.weight + 1)
        return q(x), k(x), F.linear(x, q.weight * 2)

    ours = Launches()
    ours.check(run)
    assert ours.weights == []


def test_a_weight_that_changes_between_the_calls() -> None:
    x, (q, k, _) = torch.randn(2, 8), layers()
    kept = k.weight.detach().clone()

    def run(changed: bool = False) -> Any:
        found = q(x)
        if changed:
            k.weight.mul_(2)
        return found, k(x)

    ours = Launches()
    with torch.no_grad():
        with ours.products.recorded():
            run()
        with ours.products.served():
            found = run(True)
        torch.testing.assert_close(found[1], F.linear(x, 2 * kept, k.bias))
    assert ours.weights == [2]


def test_autocast_gradients_dtypes_and_inference_tensors_are_left_alone() -> None:
    x, (q, k, v) = torch.randn(2, 8), layers()
    ours = Launches()

    def autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return q(x), k(x)

    def gradients() -> Any:
        with torch.enable_grad():
            return q(x).detach(), k(x).detach()

    with torch.inference_mode():
        inference = torch.ones(2, 8)
    for run in (autocast, gradients, lambda: [q(inference), v(inference)]):
        ours.check(run)
        assert ours.weights == []
    other = Launches()
    other.products._device = "cuda"
    other.check(lambda: [q(x), k(x)])
    assert other.weights == []


def test_nothing_is_served_outside() -> None:
    x, (q, k, _) = torch.randn(2, 8), layers()
    ours = Launches()
    ours.check(lambda: [q(x), k(x)])
    ours.weights.clear()
    q(x), k(x)
    assert ours.weights == []
