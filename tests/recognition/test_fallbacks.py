"""What the replacements hand back to the original, which then runs as if nothing were patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import hf_kernel_patch
from hf_kernel_patch.ops.rms_norm.torch import rms_norm
from tests.recognition.leaves.rope_inputs import ROPE, rope_inputs
from tests.support.probes import watched_kernel
from tests.support.tiny import (
    TRANSFORMERS_5,
    largest_error,
    modelling,
    outputs_and_gradients,
    tiny_model,
    tokens,
)


def reasons(report: Any) -> dict[str, int]:
    """Reason -> number of calls handed back, over all rows."""
    found: dict[str, int] = {}
    for row in report:
        for reason, count in row.fallbacks.items():
            found[reason] = found.get(reason, 0) + count
    return found


def loss_and_logits(model: Any) -> Any:
    return model(tokens(), labels=tokens())


def in_float64(model: Any) -> None:
    model.config._experts_implementation = "eager"  # the grouped products take no float64
    model.double()


def hook_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)


def hook_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def adapter_on_the_head(model: Any) -> None:
    class Adapter(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model.lm_head.__class__ = Adapter


def another_loss(model: Any) -> None:
    model.loss_function = lambda logits, labels, *_, **options: logits.float().logsumexp(-1).sum()


def replaced_cross_entropy(model: Any) -> None:
    # As Liger does it; the fixture takes it back.
    plain = functional.cross_entropy
    functional.cross_entropy = lambda *arguments, **options: plain(*arguments, **options)


@pytest.fixture(autouse=True)
def plain_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "cross_entropy", functional.cross_entropy)


def transposed_experts(model: Any) -> None:
    model.config._experts_implementation = "eager"
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = True


def experts_of(model: Any) -> list[Any]:
    return [layer.mlp.experts[0] for layer in model.model.layers]


def hook_experts(model: Any) -> None:
    for expert in experts_of(model):
        expert.gate_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def bias_in_experts(model: Any) -> None:
    for expert in experts_of(model):
        expert.up_proj.bias = nn.Parameter(torch.randn(expert.up_proj.out_features))


def own_forward_in_experts(model: Any) -> None:
    for expert in experts_of(model):
        forward = expert.forward
        expert.forward = lambda x, forward=forward: forward(x) * 2


def autocast(model: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_and_logits(model)


Call = Callable[[Any], Any]
NOTHING: Call = lambda model: None  # noqa: E731
EXPERTS_5: list[tuple[str, str, Call, Call, str]] = [
    ("qwen3_moe", "moe", transposed_experts, loss_and_logits, "experts with is_transposed=True"),
]
EXPERTS_4: list[tuple[str, str, Call, Call, str]] = [
    ("qwen3_moe", "moe", hook_experts, loss_and_logits, "an expert is wrapped"),
    ("qwen3_moe", "moe", bias_in_experts, loss_and_logits, "an expert is wrapped"),
    ("qwen3_moe", "moe", own_forward_in_experts, loss_and_logits, "an expert is wrapped"),
]
# architecture, op, change to the model, call, reason
HANDED_BACK: list[tuple[str, str, Call, Call, str]] = [
    *(
        ("qwen3_moe", op, in_float64, loss_and_logits, "a tensor is float64")
        for op in ("rms_norm", "rope", "moe", "linear_cross_entropy")
    ),
    ("llama", "swiglu", in_float64, loss_and_logits, "a tensor is float64"),
    ("llama", "swiglu", hook_activation, loss_and_logits, "a hook on the activation"),
    ("qwen3_moe", "moe", NOTHING, autocast, "autocast chooses the dtype"),
    *(EXPERTS_5 if TRANSFORMERS_5 else EXPERTS_4),
    ("llama", "linear_cross_entropy", hook_head, loss_and_logits, "a hook on the head"),
    ("llama", "linear_cross_entropy", adapter_on_the_head, loss_and_logits, "Adapter"),
    ("llama", "linear_cross_entropy", another_loss, loss_and_logits, "another loss function"),
    ("llama", "linear_cross_entropy", nn.Module.eval, loss_and_logits, "the logits are wanted"),
    ("llama", "linear_cross_entropy", NOTHING, lambda model: model(tokens()), "no labels"),
    (
        "llama",
        "linear_cross_entropy",
        replaced_cross_entropy,
        loss_and_logits,
        "cross_entropy is tests.recognition.test_fallbacks's",
    ),
]


@pytest.mark.parametrize(
    ("name", "op", "change", "call", "reason"),
    HANDED_BACK,
    ids=[f"{row[1]}, {row[4]}, {i}" for i, row in enumerate(HANDED_BACK)],
)
def test_handed_back_is_the_original_bit_for_bit_and_says_why(
    name: str, op: str, change: Call, call: Call, reason: str
) -> None:
    model = tiny_model(name).train()
    change(model)
    eager = call(model)
    with hf_kernel_patch.patched(op, models=name, strict=True) as report:
        inside = call(model)
    assert type(inside) is type(eager)
    pair = (list(inside.values()), list(eager.values())) if hasattr(eager, "values") else ()
    for one, other in zip(*(pair or (inside, eager)), strict=True):
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other)
    found = reasons(report)
    assert len(found) == 1
    assert reason in next(iter(found))


def test_another_activation_is_not_taken_for_silu() -> None:
    model = tiny_model("llama", hidden_act="relu")
    eager = outputs_and_gradients(model)
    with hf_kernel_patch.patched("swiglu", models="llama", strict=True) as report:
        assert largest_error(outputs_and_gradients(model), eager) == 0
    assert list(reasons(report).values()) == [2]
    assert "ReLU" in next(iter(reasons(report)))


def test_a_gate_of_another_activation_is_not_taken_for_silu() -> None:
    norm = modelling("qwen3_next").Qwen3NextRMSNormGated(16)
    if not hasattr(norm, "activation"):
        pytest.skip("this transformers has silu alone")
    norm.activation = "relu"
    x, gate = torch.randn(2, 5, 16)
    eager = norm(x, gate)
    with hf_kernel_patch.patched("rms_norm", models="qwen3_next", strict=True) as report:
        assert torch.equal(norm(x, gate), eager)
    assert reasons(report) == {"the gate's activation is relu, not silu": 1}


def test_without_a_gate_the_original_says_what_it_says() -> None:
    norm = modelling("qwen3_next").Qwen3NextRMSNormGated(16)
    with pytest.raises(Exception) as eager:
        norm(torch.randn(5, 16))
    patched = hf_kernel_patch.patched("rms_norm", models="qwen3_next", strict=True)
    with patched, pytest.raises(type(eager.value)) as inside:
        norm(torch.randn(5, 16))
    message = str(eager.value).partition("Qwen3NextRMSNormGated.")[2]
    assert message in str(inside.value)


def test_a_gate_that_is_broadcast_is_handed_back() -> None:
    norm = modelling("qwen3_next").Qwen3NextRMSNormGated(16)
    x, gate = torch.randn(5, 16), torch.randn(1, 16)
    eager = norm(x, gate)
    with hf_kernel_patch.patched("rms_norm", models="qwen3_next", strict=True) as report:
        assert torch.equal(norm(x, gate), eager)
    assert reasons(report) == {"the gate has another shape than x": 1}


def test_a_kernel_that_knows_no_gate_gets_none() -> None:
    def five(x: Any, weight: Any, eps: float, offset: float, cast_first: bool) -> torch.Tensor:
        return rms_norm(x, weight, eps, offset, cast_first)

    def why_fallback(cls: Any, x: Any, weight: Any, eps: Any, offset: Any, cast_first: Any) -> None:
        return None

    model = tiny_model("qwen3_next")
    eager = model(tokens()).logits
    for members in ({"function": five}, {"why_fallback": classmethod(why_fallback)}):
        chosen = {"include": "own_rmsnorm", "models": "qwen3_next"}
        with watched_kernel(**members), hf_kernel_patch.patched(**chosen) as report:
            assert torch.equal(model(tokens()).logits, eager)
        assert reasons(report) == {"own_rmsnorm takes no gate": 1}
        assert {row.site.rpartition("RMSNorm")[2]: row.served for row in report} == {
            ".forward": 7,
            "Gated.forward": 0,
        }


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no choice of experts")
def test_an_experts_implementation_that_was_asked_for_is_kept_unless_the_op_is_named() -> None:
    model = tiny_model("qwen3_moe", experts_implementation="eager")
    with hf_kernel_patch.patched(models="qwen3_moe") as report:
        model(tokens())
    row = next(row for row in report if row.site.endswith("Experts.forward"))
    assert row.fallbacks == {"experts_implementation='eager' was asked for": 2}
    with hf_kernel_patch.patched("moe", models="qwen3_moe") as report:
        model(tokens())
    assert [row.served for row in report if row.site.endswith("Experts.forward")] == [2]


class Tagged(torch.Tensor):
    """A subclass without behaviour of its own."""


def forward_mode(norm: Any, x: torch.Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent


TRANSFORMS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "forward-mode differentiation": forward_mode,
    "a torch.func transform": lambda norm, x: torch.func.vmap(norm)(x),
    "torch.jit.trace": lambda norm, x: torch.jit.trace(norm, x, check_trace=False)(x),
    "a tensor is a Tagged": lambda norm, x: norm(x.as_subclass(Tagged)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("reason", TRANSFORMS)
def test_transforms_of_torch_see_the_original(reason: str) -> None:
    norm, x = modelling("llama").LlamaRMSNorm(8), torch.randn(3, 8)
    eager = TRANSFORMS[reason](norm, x)
    with hf_kernel_patch.patched("rms_norm", models="llama", strict=True) as report:
        inside = TRANSFORMS[reason](norm, x)
    assert type(inside) is type(eager)
    assert torch.equal(inside, eager)
    assert all(reason in found for found in reasons(report))
    assert reasons(report)


@pytest.mark.parametrize("heads_at", [1, 2])
@pytest.mark.parametrize("name", ROPE)
def test_gradients_of_cos_and_sin_come_from_the_original(name: str, heads_at: int) -> None:
    module = modelling(name)

    def gradients() -> tuple[torch.Tensor, ...]:
        q, k, cos, sin = (x.requires_grad_() for x in rope_inputs(name, heads_at))
        out = module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=heads_at)
        return torch.autograd.grad(out[0].sum() + out[1].sum(), (q, k, cos, sin))

    eager = gradients()
    with hf_kernel_patch.patched("rope", models=name, strict=True) as report:
        inside = gradients()
    assert all(torch.equal(*pair) for pair in zip(inside, eager, strict=True))
    assert reasons(report) == {"cos or sin needs a gradient": 1}
