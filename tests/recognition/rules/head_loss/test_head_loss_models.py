"""One model of each way in which heads and losses are written: trained as eager trains it."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import Architecture, registry
from hf_kernel_patch.kernels import register_kernel
from hf_kernel_patch.models import architectures
from hf_kernel_patch.ops.linear_cross_entropy import CudaFusedLinearCrossEntropy
from tests.families.building import Case, inputs_of, model_class, reset_seeds, tiny_model
from tests.families.cases import CASES
from tests.support.tiny import TRANSFORMERS_5, error

pytestmark = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="transformers 4 builds and writes half of them in other ways"
)
LOSS = "linear_cross_entropy"
#: What the family shows -> its class, and why its calls fall back, if they do.
KINDS: dict[str, tuple[str, str]] = {
    "vocabulary of a text config": ("LlavaForConditionalGeneration", ""),
    "images in a grid": ("Qwen2_5_VLForConditionalGeneration", ""),
    "deep features": ("Qwen3VLForConditionalGeneration", ""),
    "capped by a text config": ("Gemma3ForConditionalGeneration", ""),
    "vocabulary by place": ("Llama4ForCausalLM", ""),
    "divided": ("GraniteForCausalLM", ""),
    "multiplied at once": ("HyperCLOVAXForCausalLM", ""),
    "multiplied if at all": ("CohereCompassForConditionalGeneration", ""),
    "upcast": ("MllamaForCausalLM", ""),
    "cast, upcast and a tuple": ("MambaForCausalLM", ""),
    "dense": ("OPTForCausalLM", ""),
    "capped": ("Gemma2ForCausalLM", ""),
    "capped in float32": ("BeamForCausalLM", ""),
    "capped by a walrus": ("Gemma4ForConditionalGeneration", ""),
    "capped by a local name": ("PaliGemmaForConditionalGeneration", ""),
    "capped in one line": ("RecurrentGemmaForCausalLM", ""),
    "capped in any case": ("MistralLarge4ForConditionalGeneration", ""),
    "multiplied and capped": ("MuseGlimmerForConditionalGeneration", ""),
    "capped by a module": ("Inkling2ForCausalLM", ""),
    "a padded vocabulary": ("InklingForCausalLM", ""),
    "labels that are shifted": ("MoonshineForConditionalGeneration", ""),
    "shifted labels popped": ("CanaryForConditionalGeneration", ""),
    "labels of the same place": ("ModernBertForMaskedLM", ""),
    "a tuple on request": ("BloomForCausalLM", ""),
    "logits used on a branch": ("BambaForCausalLM", ""),
    "an output with a name": ("EvollaForProteinText2Text", ""),
    "a head around a projection": ("T5GemmaForConditionalGeneration", ""),
    "a head of its own class": (
        "RobertaForCausalLM",
        "the head is a transformers.models.roberta.modeling_roberta.RobertaLMHead",
    ),
}
BY_NAME = {case.name: case for case in CASES}
BY_NAME["ModernBertForMaskedLM"] = Case("modernbert", "ModernBertForMaskedLM")


def case_of(name: str) -> Case:
    """The case of a class that this transformers has."""
    case = BY_NAME.get(name)
    if case is None:
        pytest.skip(f"no case for {name}")
    try:
        model_class(case)
    except AttributeError:
        pytest.skip(f"this transformers has no {name}")
    return case


@pytest.fixture
def table() -> Iterator[Callable[[Case], str]]:
    """Registers a table of the one forward of a case's class; returns its name."""

    def register(case: Case) -> str:
        kind = model_class(case)
        rows = {f"{kind.__name__}.forward": "head_loss"}
        hf_kernel_patch.register_model(Architecture("probe", rows, module=kind.__module__))
        return "probe"

    yield register
    architectures().pop("probe", None)


def shifted(labels: torch.Tensor) -> torch.Tensor:
    ignored = torch.full_like(labels[:, :1], -100)
    return torch.cat([labels[:, 1:], ignored], 1)


def asked(case: Case, model: Any) -> dict[str, dict[str, Any]]:
    """Calls by name: what each is given."""
    given = inputs_of(case, model)
    labels = given["labels"]
    found = {
        "step": given,
        "no labels": {name: value for name, value in given.items() if name != "labels"},
        "evaluation": given,
        "tuple": {**given, "return_dict": False},
        "items": {**given, "num_items_in_batch": torch.tensor(7)},
    }
    if labels.dim() == 2:
        found["shifted"] = {**given, "shift_labels": shifted(labels)}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            found["kept"] = {**given, "labels": labels[:, -4:].contiguous(), "logits_to_keep": 4}
    return found


def outcome(model: Any, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Loss, logits and gradients of a call, or its error."""
    reset_seeds()
    model.train(name != "evaluation").zero_grad()
    try:
        output = model(**given)
    except Exception as raised:
        return {"error": (type(raised), str(raised))}
    if isinstance(output, tuple):
        found = dict(zip(("loss", "logits") if "labels" in given else ("logits",), output))
    else:
        found = {key: output[key] for key in ("loss", "logits") if output.get(key) is not None}
    if "loss" in found:
        found["loss"].backward()
    named = model.named_parameters()
    return found | {key: p.grad.clone() for key, p in named if p.grad is not None}


def agree(inside: dict[str, Any], eager: dict[str, Any], name: str) -> None:
    assert list(inside) == list(eager), name
    norms = [
        g.double().norm() for key, g in eager.items() if key not in ("loss", "logits", "error")
    ]
    for key, expected in eager.items():
        found = inside[key]
        if key == "error":
            assert found == expected, name
        elif key == "logits":
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name
        elif key == "loss":
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert error(found.detach(), expected.detach()) < 4e-6, name
        else:
            away = (found.double() - expected.double()).norm()
            assert away <= 5e-6 * expected.double().norm() + 1e-6 * max(norms), (name, key)


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_of_writing_it_trains_as_eager_does(
    kind: str, table: Callable[[Case], str]
) -> None:
    class_name, reason = KINDS[kind]
    case = case_of(class_name)
    model = tiny_model(case)
    calls = asked(case, model)
    eager = {name: outcome(model, name, given) for name, given in calls.items()}
    model = tiny_model(case)  # anew, for it may keep statistics of what it was trained with
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(LOSS, models=table(case), strict=True) as report:
        inside = {name: outcome(model, name, given) for name, given in calls.items()}
    for name in calls:
        agree(inside[name], eager[name], name)
    assert "error" not in eager["step"]
    trained = [n for n in calls if n not in ("no labels", "evaluation") and "loss" in eager[n]]
    (row,) = report
    if reason:
        assert row.fallbacks[reason] >= len(trained)
    else:
        assert row.served == len(trained) >= 3
        assert set(row.fallbacks) <= {
            "no labels: there is no loss",
            "evaluation: the logits are wanted",
        }


HALF = [
    "MllamaForCausalLM",
    "BeamForCausalLM",
    "GraniteForCausalLM",
    "MuseGlimmerForConditionalGeneration",
]


@pytest.mark.parametrize("name", HALF)
def test_logits_of_half_precision_are_rounded_as_the_original_rounds_them(
    name: str, table: Callable[[Case], str]
) -> None:
    case = case_of(name)
    model = tiny_model(case, torch.bfloat16)
    given = inputs_of(case, model)
    eager = outcome(model, "step", given)
    with hf_kernel_patch.patched(LOSS, models=table(case), strict=True):
        inside = outcome(model, "step", given)
    assert inside["logits"].dtype is eager["logits"].dtype
    assert torch.equal(inside["logits"], eager["logits"])
    reset_seeds()
    wide = tiny_model(case, torch.float64)
    wide.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")
    truth = outcome(wide, "step", inputs_of(case, wide))
    assert error(inside["loss"].detach(), truth["loss"].detach()) <= 2e-3 + 1.1 * error(
        eager["loss"].detach(), truth["loss"].detach()
    )


@pytest.fixture
def here() -> Iterator[str]:
    """The Triton kernel on whatever device there is: a GPU, or the CPU by the interpreter."""
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        pytest.skip("needs a CUDA device, or Triton's interpreter")
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    members = {"kernel_id": "loss_of_models", "device": device}
    members["check_deps"] = classmethod(lambda cls: None)
    register_kernel(type("Here", (CudaFusedLinearCrossEntropy,), members))
    yield "loss_of_models"
    del registry.kernels()["loss_of_models"]


COMPILED = [
    "HyperCLOVAXForCausalLM",
    "BeamForCausalLM",
    "MllamaForCausalLM",
    "RecurrentGemmaForCausalLM",
]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("name", COMPILED)
def test_a_whole_step_compiles_into_one_graph(
    name: str, here: str, table: Callable[[Case], str]
) -> None:
    case = case_of(name)
    device = registry.kernels()[here].device
    model = tiny_model(case).to(device)
    given = {key: value.to(device) for key, value in inputs_of(case, model).items()}
    given["use_cache"] = False
    eager = outcome(model, "step", given)
    torch._dynamo.reset()
    with hf_kernel_patch.patched(here, models=table(case), strict=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        model.train().zero_grad()
        output = compiled(**given)
        output.loss.backward()
    torch._dynamo.reset()
    torch.testing.assert_close(output.loss, eager["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.logits, eager["logits"])
    for key, parameter in model.named_parameters():
        if key in eager:
            torch.testing.assert_close(parameter.grad, eager[key], rtol=1e-3, atol=1e-5)


def test_no_kind_is_missing() -> None:
    assert [name for name, _ in KINDS.values() if name not in BY_NAME] == []
