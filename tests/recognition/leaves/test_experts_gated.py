"""Experts with a gate of their own, biases or transposed weights, by the op in PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_kernel_patch.ops.moe import CudaFusedMoE, TorchFusedMoE
from hf_kernel_patch.recognition import Composed, Request, composed, known, why_not
from hf_kernel_patch.recognition.leaves import experts_gated
from hf_kernel_patch.recognition.outcome import SERVED, fallback
from hf_kernel_patch.recognition.site import Site
from tests.support.tiny import (
    ARCHITECTURES,
    TRANSFORMERS_5,
    error,
    largest_error,
    modelling,
    outputs_and_gradients,
    tiny_model,
)

pytestmark = pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no stacked experts")
HIDDEN, WIDTH, EXPERTS = 32, 16, 4
_CONFIG: dict[str, Any] = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), WIDTH),
    "moe_num_experts": EXPERTS,
    "hidden_size": HIDDEN,
    "moe_hidden_size": HIDDEN,
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "swiglu_limit": 0.5,
    "swiglu_alpha": 1.702,
    "softcap": 5.0,
    "moe_latent_size": None,
    "post_norm_eps": 1e-6,
    "mlp_gate_softcap": 5.0,
    "mlp_up_softcap": 5.0,
}
#: Modelling modules of transformers -> their class of experts.
KINDS = {
    "aria": "AriaExperts",
    "beam": "BeamExperts",
    "deepseek_v4": "DeepseekV4Experts",
    "glm5_next": "Glm5NextTextExperts",
    "gpt_oss": "GptOssExperts",
    "hy_v4": "HYV4Experts",
    "hy_v4_vl": "HYV4VLExperts",
    "inkling2": "Inkling2Experts",
    "inkling2_loop": "Inkling2LoopExperts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "muse_spark": "MuseSparkExperts",
    "nemotron_h": "NemotronHExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
    "step3p7": "Step3p7Experts",
}


def class_of(name: str) -> Any:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return getattr(module, KINDS[name])


def is_known(name: str) -> bool:
    """Whether the installed transformers has such experts; Aria's were others before."""
    if not TRANSFORMERS_5 or not importlib.util.find_spec(f"transformers.models.{name}"):
        return False
    cls = class_of(name)
    return known()["moe.gated"].why_not(cls.forward, cls) is None


NAMES = [name for name in KINDS if is_known(name)]
every = pytest.mark.parametrize("name", NAMES)


def built(name: str, implementation: str = "grouped_mm", dtype: Any = torch.float32) -> Any:
    """Experts with random weights, the same at every call."""
    config = SimpleNamespace(**_CONFIG, _experts_implementation=implementation)
    experts = class_of(name)(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return experts.to(dtype)


def results(function: Any, experts: Any, dtype: Any = None) -> dict[str, torch.Tensor]:
    """The output and every gradient, of nine tokens and the experts that they chose."""
    dtype = dtype or next(experts.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, HIDDEN, generator=generator).to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=generator).to(dtype).requires_grad_()
    out = function(experts, hidden, index, weights)
    leaves = {"hidden": hidden, "weights": weights, **dict(experts.named_parameters())}
    grads = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.fixture
def in_force() -> Iterator[Callable[..., tuple[Composed, Counter[str]]]]:
    """Puts the leaf in force on a class: what it runs then, and what its calls meet."""
    sites: list[Site] = []

    def force(cls: Any, kernel: Any = TorchFusedMoE, explicit: bool = True) -> Any:
        request = Request("moe.gated", kernel, explicit)
        assert why_not(cls.forward, cls, request) is None
        made = composed(cls.forward, cls, (request,), alone=False)
        site, calls = made.sites[request], Counter[str]()
        site.active, site.counters = True, [calls]
        sites.append(site)
        return made.function, calls

    yield force
    for site in sites:
        site.release()


def test_they_are_there() -> None:
    assert {"gpt_oss", "nemotron_h"} <= set(NAMES)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_no_further_from_the_truth_than_the_original(
    name: str, dtype: Any, in_force: Any
) -> None:
    experts = built(name, dtype=dtype)
    forward, calls = in_force(type(experts))
    ours = results(forward, experts)
    assert calls == {SERVED: 1}
    original = type(experts).forward
    theirs = [results(original, experts)]
    if name != "openai_privacy_filter":  # whose loop is in float32
        experts.config = SimpleNamespace(**_CONFIG, _experts_implementation="eager")
        theirs.append(results(original, experts))
    # The privacy filter's loop would compute in float32.
    truth = results(original, built(name, "batched_mm", dtype).double())
    epsilon = torch.finfo(dtype).eps
    for own, right in truth.items():
        assert ours[own].dtype == theirs[0][own].dtype
        limit = max(error(one[own], right) for one in theirs)
        assert error(ours[own], right) <= 1.2 * limit + epsilon / 2, own


def doubled(gate: Any) -> Any:
    return lambda self, rows: 2 * gate(self, rows)


@every
@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_gate_that_is_set_later_runs(
    name: str, where: str, in_force: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = built(name)
    cls = type(experts)
    forward, calls = in_force(cls)
    results(forward, experts)
    gate = doubled(cls._apply_gate)
    if where == "class":
        monkeypatch.setattr(cls, "_apply_gate", gate)
    else:
        experts._apply_gate = MethodType(gate, experts)
    eager = results(cls.forward, experts)
    assert largest_error(results(forward, experts), eager) < 3e-6
    written_out = name in ("aria", "muse_spark")  # in the loop, so that it is the original's call
    reason = {fallback("experts with an _apply_gate of their own"): 1}
    assert calls == ({SERVED: 1} | reason if written_out else {SERVED: 2})


@every
@pytest.mark.parametrize("asked", ["grouped_mm", "eager", "batched_mm"])
def test_auto_leaves_them_to_what_is_as_fast_or_was_asked_for(
    name: str, asked: str, in_force: Any
) -> None:
    experts = built(name, asked)
    forward, calls = in_force(type(experts), explicit=False)
    eager = results(type(experts).forward, experts)
    found = results(forward, experts)
    reasons = {"grouped_mm": "not measured to be faster than grouped_mm"}
    reason = reasons.get(asked, f"experts_implementation={asked!r} was asked for")
    if name == "step3p7":  # which knows nothing but its loop
        reason = ""
    else:
        assert all(torch.equal(found[own], eager[own]) for own in eager)
    assert calls == {fallback(reason) if reason else SERVED: 1}
    assert known()["moe.gated"].why_fallback(experts) == reason


@every
def test_a_kernel_that_computes_no_gate_leaves_them(name: str, in_force: Any) -> None:
    pytest.importorskip("triton")
    experts = built(name)
    members = {"device": "any", "check_deps": classmethod(lambda cls: None)}
    forward, calls = in_force(type(experts), type("Here", (CudaFusedMoE,), members))
    eager = results(type(experts).forward, experts)
    found = results(forward, experts)
    assert all(torch.equal(found[own], eager[own]) for own in eager)
    assert calls == {fallback(experts_gated.OWN_GATE): 1}


@pytest.mark.parametrize(
    ("name", "attribute"), [("gpt_oss", "has_bias"), ("nemotron_h", "is_transposed")]
)
def test_another_layout_than_the_code_has_is_the_original_s(
    name: str, attribute: str, in_force: Any
) -> None:
    experts = built(name, "eager")
    forward, calls = in_force(type(experts))
    eager = results(type(experts).forward, experts)
    value = not getattr(experts, attribute)
    setattr(experts, attribute, value)
    found = results(forward, experts)
    assert all(torch.equal(found[own], eager[own]) for own in eager)
    assert calls == {fallback(f"experts with {attribute}={value}"): 1}


def test_a_loop_in_float32_is_the_original_s_where_it_was_asked_for(in_force: Any) -> None:
    name = "openai_privacy_filter"
    if name not in NAMES:
        pytest.skip("transformers has no privacy filter")
    experts = built(name, "eager", torch.bfloat16)
    forward, calls = in_force(type(experts))
    eager = results(type(experts).forward, experts)
    found = results(forward, experts)
    assert all(torch.equal(found[own], eager[own]) for own in eager)
    assert calls == {fallback("the original computes in float32"): 1}


def test_experts_without_routes_fail_as_before(in_force: Any) -> None:
    experts = built("gpt_oss", "eager")
    forward, calls = in_force(type(experts))
    for function in (forward, type(experts).forward):
        with pytest.raises(TypeError):
            function(experts, torch.randn(3, HIDDEN))
    assert calls == {fallback("there are no routes"): 1}


@pytest.mark.parametrize("kernel", [TorchFusedMoE, CudaFusedMoE])
def test_torch_compile_sees_the_original_as_one_graph(kernel: Any, in_force: Any) -> None:
    if kernel is CudaFusedMoE:
        pytest.importorskip("triton")
        members = {"device": "any", "check_deps": classmethod(lambda cls: None)}
        kernel = type("Here", (CudaFusedMoE,), members)
    experts = built("gpt_oss", dtype=torch.bfloat16)
    original = type(experts).forward
    forward, _ = in_force(type(experts), kernel)
    torch._dynamo.reset()
    try:
        eager = results(torch.compile(original, fullgraph=True, backend="aot_eager"), experts)
    except torch._dynamo.exc.Unsupported:
        pytest.skip("the original does not compile as one graph")
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert largest_error(results(compiled, experts), eager) == 0
    torch._dynamo.reset()


needs_gpt_oss = pytest.mark.skipif("gpt_oss" not in ARCHITECTURES, reason="there is no GPT-OSS")


@needs_gpt_oss
@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_trains_with_and_without_adapters_on_its_experts(
    adapted: bool, in_force: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt_oss")
    if adapted:
        peft = pytest.importorskip("peft")
        stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=2, target_parameters=stacked, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    eager = outputs_and_gradients(model)
    cls = modelling("gpt_oss").GptOssExperts
    forward, calls = in_force(cls)
    monkeypatch.setattr(cls, "forward", forward)
    assert largest_error(outputs_and_gradients(model), eager) < 3e-6
    assert calls == {SERVED: 2}


@needs_gpt_oss
def test_decoding_takes_batched_mm_where_the_experts_are_left() -> None:
    model = tiny_model("gpt_oss").to("meta")  # on a CPU transformers does not switch
    cls = type(model)
    request = Request("moe.decoding", TorchFusedMoE)
    original = cls._optimize_model_for_decode
    made = composed(original, cls, (request,), alone=False)
    made.sites[request].active = True
    try:
        with made.function(model):
            assert model.config._experts_implementation == "batched_mm"
        assert model.config._experts_implementation == "grouped_mm"
    finally:
        made.sites[request].release()
