"""One family, trained and asked to generate as it is and patched by every op: what differs."""

from __future__ import annotations

import inspect
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import hf_kernel_patch
from tests.families.building import Case, inputs_of, packed_inputs, reset_seeds, tiny_model
from tests.support.tiny import error

#: Float32 results that are nearer to each other than this are taken as equal.
NEAR = 3e-6
#: Others are no further from a float64 run of the original than this many times eager's error.
TIMES = 3.0
#: What cancellation leaves of a gradient, beside the norm of all gradients of the step.
FLOOR = 1e-7
TOKENS = 8

Tensors = dict[str, torch.Tensor]


@dataclass
class Result:
    """What became of one case; ``errors`` is empty where it is served as it should be."""

    family: str
    name: str
    inputs: str
    #: op -> calls that it served in the training step.
    served: Counter[str] = field(default_factory=Counter)
    #: (op, reason) -> calls of all runs that went to the original.
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: What the class itself cannot do, such as taking packed rows -> its error.
    without: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


def kernels() -> tuple[str, ...]:
    """Ids of the kernels that run on the CPU, one for each op."""
    return tuple(name for name in hf_kernel_patch.get_available_kernels() if "torch_" in name)


def run(case: Case, route: str = "global") -> Result:
    """Everything about one case.

    ``route`` is how it is patched: "global" after the eager runs, "before" the family's module
    is imported, or "model", that one model alone.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    result = Result(case.family, case.name, case.inputs)
    hf_kernel_patch.count_calls()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if route == "before":
            assert not [
                m for m in sys.modules if m.startswith(f"transformers.models.{case.family}.")
            ]
            inside = _patched(case, route, result)
            eager = _observe(case, tiny_model(case), result.without.__setitem__)
        else:
            eager = _observe(case, tiny_model(case), result.without.__setitem__)
            inside = _patched(case, route, result)
        result.errors += _differences(case, eager, inside)
    hf_kernel_patch.count_calls(False)
    result.seconds = time.perf_counter() - started
    return result


def _patched(case: Case, route: str, result: Result) -> dict[str, Tensors]:
    def served(scenario: str) -> None:
        if scenario == "step":
            for row in hf_kernel_patch.status():
                result.served[row.op] += row.served

    def fails(scenario: str, reason: str) -> None:
        if scenario not in result.without and route != "before":
            result.errors.append(f"{scenario}: fails when patched: {reason}")

    if route == "model":
        model = tiny_model(case)
        hf_kernel_patch.apply_default_kernels(model, kernels())
        try:
            inside = _observe(case, model, fails, served)
            _count_fallbacks(result, hf_kernel_patch.status())
        finally:
            hf_kernel_patch.unpatch(model)
        return inside
    with hf_kernel_patch.patched(kernels()) as report:
        inside = _observe(case, tiny_model(case), fails, served)
        _count_fallbacks(result, report)
    result.served = +result.served
    return inside


def _count_fallbacks(result: Result, report: Any) -> None:
    for row in report:
        for reason, count in row.fallbacks.items():
            result.fallbacks[row.op, reason] += count


def _observe(
    case: Case,
    model: Any,
    fails: Callable[[str, str], None],
    done: Callable[[str], None] = lambda scenario: None,
) -> dict[str, Tensors]:
    """scenario -> its tensors; ``fails`` is told of a scenario that raises."""
    found: dict[str, Tensors] = {}
    for scenario, what in _SCENARIOS.items():
        reset_seeds()
        try:
            tensors = what(case, model)
        except Exception as raised:
            if scenario == "step":
                raise
            fails(scenario, f"{type(raised).__name__}: {raised}".partition("\n")[0][:200])
            continue
        if tensors:
            found[scenario] = tensors
        done(scenario)
    return found


def _step(case: Case, model: Any) -> Tensors:
    return _train(model, inputs_of(case, model))


def _packed(case: Case, model: Any) -> Tensors:
    if case.inputs != "text" or "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return _train(model, packed_inputs())


def _checkpointed(case: Case, model: Any) -> Tensors:
    if not model.supports_gradient_checkpointing:
        return {}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        return _train(model, inputs_of(case, model))
    finally:
        model.gradient_checkpointing_disable()


def _generated(case: Case, model: Any) -> Tensors:
    if not model.can_generate():
        return {}
    given = inputs_of(case, model)
    del given["labels"]
    model.eval()
    try:
        with torch.no_grad():
            tokens = model.generate(
                **given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, num_beams=1
            )
    finally:
        model.train()
    return {"tokens": tokens}


_SCENARIOS: dict[str, Callable[[Case, Any], Tensors]] = {
    "step": _step,
    "packed": _packed,
    "checkpointed": _checkpointed,
    "generated": _generated,
}


def _train(model: Any, inputs: dict[str, Any]) -> Tensors:
    """Loss, logits and every gradient of one training step."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    found = {"loss": output.loss.detach()}
    if isinstance(getattr(output, "logits", None), torch.Tensor):
        found["logits"] = output.logits.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.detach().clone()
    return found


def _differences(case: Case, eager: dict[str, Tensors], inside: dict[str, Tensors]) -> list[str]:
    """What is not equal within rounding, in words."""
    found = []
    truth: dict[str, Tensors] | None = None
    for scenario, expected in eager.items():
        tensors = inside.get(scenario, {})
        if expected.keys() != tensors.keys():
            odd = sorted(expected.keys() ^ tensors.keys())
            found.append(f"{scenario}: not in both: {', '.join(odd[:4])} ({len(odd)})")
            continue
        far = [name for name in expected if not _near(tensors[name], expected[name])]
        if far and truth is None:
            truth = _truth(case)
        found += [
            f"{scenario}: {complaint}"
            for name in far
            if (complaint := _further(name, tensors, expected, (truth or {}).get(scenario, {})))
        ]
    return found


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if not found.is_floating_point():
        return torch.equal(found, expected)
    return torch.equal(found, expected) or error(found, expected) < NEAR


def _further(name: str, tensors: Tensors, expected: Tensors, truth: Tensors) -> str:
    """The complaint where a tensor is further from the truth than eager's; else ""."""
    ours, eager = tensors[name], expected[name]
    if not ours.is_floating_point():
        return f"{name} differ"
    gradients = [value.double().norm() for key, value in expected.items() if key != "logits"]
    floor = FLOOR * float(torch.stack(gradients).norm())
    if float((ours.double() - eager.double()).norm()) <= floor:
        return ""
    if name not in truth:
        return f"{name} differ by {error(ours, eager):.1e} (no float64 run of the original)"
    true = truth[name]
    away, eager_away = (float((one.double() - true).norm()) for one in (ours, eager))
    if away <= TIMES * eager_away + floor:
        return ""
    return (
        f"{name}: {away / max(float(true.norm()), 1e-30):.1e} from the float64 run, "
        f"eager {eager_away / max(float(true.norm()), 1e-30):.1e}"
    )


def _truth(case: Case) -> dict[str, Tensors]:
    model = tiny_model(case, torch.float64)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped products take no float64
    try:
        return _observe(case, model, lambda scenario, reason: None)
    except Exception:
        return {}
