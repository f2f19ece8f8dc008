"""Experts that are not what they look like: gates of their own, unlike dtypes, other indices."""

from __future__ import annotations

import importlib
import importlib.util
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch

import hf_kernel_patch
from tests.recognition.leaves.experts import OURS, takes_names
from tests.support.moe_kernels import KERNELS, registered
from tests.support.tiny import TRANSFORMERS_5, modelling, tiny_config, tiny_model, tokens

pytestmark = pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no stacked experts")
OWN_GATE = "experts with an _apply_gate of their own"
#: Modelling modules of transformers whose experts have a gate of their own, by version.
GATED = [
    name
    for name in ("beam", "deepseek_v4", "glm5_next", "hy_v4", "minimax_m3_vl")
    if TRANSFORMERS_5 and importlib.util.find_spec(f"transformers.models.{name}")
]
_CONFIG = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "hidden_act": "silu",
    "swiglu_limit": 0.5,
    "swiglu_alpha": 1.702,
}


def routed(experts: Any, size: int) -> torch.Tensor:
    """The experts' output for seven tokens, always the same."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, size, generator=generator)
    index = torch.randint(0, 4, (7, 2), generator=generator)
    return experts(hidden, index, torch.rand(7, 2, generator=generator))


@takes_names
@pytest.mark.parametrize("name", GATED)
def test_our_name_leaves_a_gate_of_their_own_to_the_default(name: str) -> None:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    cls: Any = next(
        cls
        for cls in vars(module).values()
        if isinstance(cls, type)
        and getattr(vars(cls).get("_apply_gate"), "__module__", "") == module.__name__
    )
    experts = cls(config := SimpleNamespace(**_CONFIG, _experts_implementation="grouped_mm"))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    plain = routed(experts, 32)
    config._experts_implementation = OURS
    with pytest.warns(hf_kernel_patch.KernelPatchWarning, match=OWN_GATE):
        assert torch.equal(routed(experts, 32), plain)


def clamped(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate).clamp(max=0.01) * up


def by_subclass(experts: Any) -> None:
    experts.__class__ = type("Clamped", (type(experts),), {"_apply_gate": clamped})


def by_instance(experts: Any) -> None:
    experts._apply_gate = MethodType(clamped, experts)


def by_class(experts: Any) -> None:
    type(experts)._apply_gate = clamped


@pytest.mark.parametrize("change", [by_subclass, by_instance, by_class])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_somebody_s_gate_is_the_original_s(
    name: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    experts = [one for one in model.modules() if type(one).__name__.endswith(("Experts", "Moe"))]
    cls = type(experts[-1])
    monkeypatch.setattr(cls, "_apply_gate", cls._apply_gate)  # which takes a change back
    before = model(tokens()).logits
    change(experts[-1])
    changed = model(tokens()).logits
    assert not torch.equal(changed, before)
    with hf_kernel_patch.patched("torch_fused_moe", models=name, strict=True) as report:
        assert torch.allclose(model(tokens()).logits, changed, atol=1e-6)
    assert OWN_GATE in moe_row(report).fallbacks


def moe_row(report: Any) -> Any:
    return next(row for row in report if row.site.endswith(("Experts.forward", "Moe.forward")))


def experts_of(model: Any) -> list[Any]:
    return [one for one in model.modules() if hasattr(one, "gate_up_proj")]


@pytest.mark.parametrize("weight", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("by", ["patch", pytest.param("name", marks=takes_names)])
def test_weights_of_another_dtype_are_the_original_s(weight: str, by: str) -> None:
    model = tiny_model("qwen3_moe")
    experts = experts_of(model)[-1]
    setattr(experts, weight, torch.nn.Parameter(getattr(experts, weight).bfloat16()))
    plain = model(tokens()).logits
    if by == "name":
        model.set_experts_implementation(OURS)
        with pytest.warns(hf_kernel_patch.KernelPatchWarning, match="differ in dtype"):
            assert torch.equal(model(tokens()).logits, plain)
        return
    with hf_kernel_patch.patched("torch_fused_moe", models="qwen3_moe", strict=True) as report:
        assert torch.allclose(model(tokens()).logits, plain, atol=1e-6)
    row = moe_row(report)
    assert row.fallbacks == {"the hidden states and the experts differ in dtype": 1}
    assert row.served == 1


def small_experts(implementation: str = "eager") -> Any:
    config = tiny_config("qwen3_moe")
    config._experts_implementation = implementation
    experts = modelling("qwen3_moe").Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return experts


@pytest.mark.parametrize("kernel", KERNELS)
def test_routes_of_fewer_tokens_are_the_original_s_to_take_or_refuse(kernel: str) -> None:
    experts = small_experts()
    hidden, index, weights = torch.randn(5, 64), torch.tensor([[0, 1], [3, 2]]), torch.rand(2, 2)
    with registered(kernel), hf_kernel_patch.patched(kernel, models="qwen3_moe") as report:
        eager = experts(hidden, index, weights)
        assert not eager[2:].any()
        experts.config._experts_implementation = "grouped_mm"
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            experts(hidden, index, weights)
    assert moe_row(report).fallbacks == {"the routes are of other tokens than the hidden states": 2}
    experts.config._experts_implementation = "eager"
    assert torch.equal(experts(hidden, index, weights), eager)


@pytest.mark.parametrize("kernel", KERNELS)
def test_make_fx_sees_the_original(kernel: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    experts = small_experts("grouped_mm")
    hidden, other = torch.randn(2, 4, 64)
    index, weights = torch.tensor([[0, 1], [3, 2], [5, 7], [6, 4]]), torch.rand(4, 2)
    with torch.no_grad():
        plain = experts(other, index, weights)
        with registered(kernel), hf_kernel_patch.patched(kernel, models="qwen3_moe") as report:
            traced = make_fx(lambda *inputs: experts(*inputs))(hidden, index, weights)
        assert torch.equal(traced(other, index, weights), plain)
    assert moe_row(report).fallbacks == {"make_fx is tracing": 1}
