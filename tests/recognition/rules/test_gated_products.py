"""Gated products of real modules whose activation has a name, or another name than most."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_kernel_patch.ops.swiglu import CudaFusedSwiGLU, TorchFusedSwiGLU
from hf_kernel_patch.recognition import Composed, Request, composed, modules, why_not
from hf_kernel_patch.recognition.outcome import SERVED, fallback
from hf_kernel_patch.recognition.site import Site
from tests.support.tiny import error

T5 = {"d_model": 16, "d_ff": 24, "dropout_rate": 0.0, "dense_act_fn": "gelu_new"}
BERT = {"hidden_size": 16, "intermediate_size": 24, "hidden_activation": "gelu", "mlp_bias": True}
GEMMA = {"hidden_size": 16, "intermediate_size": 24, "hidden_activation": "gelu_pytorch_tanh"}
#: Module and class of transformers -> what its config has.
MODULES: dict[tuple[str, str], dict[str, Any]] = {
    ("t5", "T5DenseGatedActDense"): T5,
    ("mt5", "MT5DenseGatedActDense"): T5,
    ("pix2struct", "Pix2StructVisionMlp"): {**T5, "hidden_size": 16},
    ("recurrent_gemma", "RecurrentGemmaMlp"): GEMMA,
    ("gemma3n", "Gemma3nTextMLP"): {
        **GEMMA,
        "intermediate_size": [24],
        "activation_sparsity_pattern": [0.0],
    },
    ("modernbert", "ModernBertMLP"): {**BERT, "mlp_dropout": 0.0},
    ("pixtral", "PixtralMLP"): {**BERT, "hidden_act": "gelu"},
}
CASES = pytest.mark.parametrize(
    ("name", "kind"),
    [one for one in MODULES if importlib.util.find_spec(f"transformers.models.{one[0]}")],
)


def built(name: str, kind: str, **changes: Any) -> Any:
    """A module of transformers with random weights, the same at every call."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    torch.manual_seed(0)
    return getattr(module, kind)(SimpleNamespace(**{**MODULES[name, kind], **changes}))


def made_for(module: Any, kernel: Any) -> tuple[Composed, Site]:
    original, request = type(module).forward, Request("gated_product", kernel, explicit=True)
    assert why_not(original, type(module), request) is None
    made = composed(original, type(module), (request,), alone=False)
    return made, made.sites[request]


def results(function: Any, module: Any) -> list[torch.Tensor]:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = function(module, x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


@pytest.fixture
def in_force() -> Iterator[Callable[[Site], Counter[str]]]:
    """Puts a site in force for the test; gives what its calls met."""
    sites: list[Site] = []

    def force(site: Site) -> Counter[str]:
        calls: Counter[str] = Counter()
        site.active, site.counters = True, [calls]
        sites.append(site)
        return calls

    yield force
    for site in sites:
        site.release()


@CASES
def test_they_are_served_and_give_what_they_gave(name: str, kind: str, in_force: Any) -> None:
    module = built(name, kind)
    made, site = made_for(module, TorchFusedSwiGLU)
    eager = results(type(module).forward, module)
    calls = in_force(site)
    fused = results(made.function, module)
    assert calls == {SERVED: 1}
    assert max(error(one, other) for one, other in zip(fused, eager, strict=True)) < 1e-6
    site.release()
    for one, other in zip(results(made.function, module), eager, strict=True):
        assert torch.equal(one, other)


@CASES
def test_another_activation_runs_where_it_ran(name: str, kind: str, in_force: Any) -> None:
    """Before the other projection, as its random numbers and its hooks may tell."""
    module = built(name, kind)
    attribute = "act" if hasattr(module, "act") else "act_fn"
    made, site = made_for(module, TorchFusedSwiGLU)
    calls = in_force(site)
    setattr(module, attribute, nn.RReLU())
    order: list[str] = []
    for own, part in module.named_modules():
        part.register_forward_hook(lambda *_, own=own: order.append(own))
    torch.manual_seed(2)
    eager = results(type(module).forward, module)
    before, order[:] = order[:], []
    torch.manual_seed(2)
    for one, other in zip(results(made.function, module), eager, strict=True):
        assert torch.equal(one, other)
    assert order == before
    assert calls == {fallback("the activation RReLU has no fused form"): 1}
    setattr(module, attribute, nn.SiLU())  # and one that it knows, later
    results(made.function, module)
    assert calls[SERVED] == 1


@pytest.mark.parametrize("early", [False, True])
def test_another_forward_of_the_activation_s_class_runs(
    early: bool, in_force: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = built("t5", "T5DenseGatedActDense")
    made, site = made_for(module, TorchFusedSwiGLU)
    calls = in_force(site)
    monkeypatch.delitem(modules._by_class, type(module.act), raising=False)
    if not early:
        results(made.function, module)
        assert calls == {SERVED: 1}
    monkeypatch.setattr(type(module.act), "forward", lambda self, x: x * 2)
    eager = results(type(module).forward, module)
    for one, other in zip(results(made.function, module), eager, strict=True):
        assert torch.equal(one, other)
    assert calls[fallback("the activation NewGELUActivation has no fused form")] == 1
    monkeypatch.undo()
    results(made.function, module)
    assert calls[SERVED] == 2 - early


@CASES
def test_they_compile_as_one_graph_with_the_kernel_in_it(
    name: str, kind: str, in_force: Any
) -> None:
    pytest.importorskip("triton")
    members = {"device": "any", "check_deps": classmethod(lambda cls: None)}
    module = built(name, kind)
    made, site = made_for(module, type("Here", (CudaFusedSwiGLU,), members))
    eager = results(type(module).forward, module)
    in_force(site)
    torch._dynamo.reset()
    compiled = torch.compile(made.function, fullgraph=True, backend="aot_eager")
    found = results(compiled, module)
    assert max(error(one, other) for one, other in zip(found, eager, strict=True)) < 1e-6
    explained = torch._dynamo.explain(made.function)(module, torch.randn(2, 5, 16))
    assert "hf_kernel_patch.swiglu" in str(explained.graphs[0].graph)
    torch._dynamo.reset()
