"""Code that a rule nearly knows is left alone, and the report says why and where.

The cases are in ``near_misses/``, each with its label; what a rule does know, in all spellings, is
in ``near_misses/spellings.py``.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.models.llama import modeling_llama

from hf_kernel_patch import registry
from hf_kernel_patch.recognition import Request, composed, known, why_not
from hf_kernel_patch.recognition.edits import edited
from hf_kernel_patch.recognition.known import Rule
from hf_kernel_patch.recognition.outcome import SERVED, fallback
from hf_kernel_patch.recognition.rules.leaf_call import leaf_call
from tests.recognition.rules.near_misses import spellings

RULES = ("residual_norm", "gated_product", "qk_norm_rope", "head_loss", "leaf_call")
_LABEL = re.compile(r"# <(?P<exact>[-~]) (?P<reason>.*)")


def cases(rule: str) -> Any:
    """The class whose methods are the rule's near misses."""
    return importlib.import_module(f"tests.recognition.rules.near_misses.{rule}").Cases


def rule_of(name: str) -> Rule:
    """The rule, or that of the calls of Llama's rotary function."""
    if name != "leaf_call":
        rule: Any = known()[name]
        return rule
    rotary: Any = known()["rope.full"]
    function = modeling_llama.apply_rotary_pos_emb
    return leaf_call(rotary, modeling_llama, "apply_rotary_pos_emb", function)


def label_of(function: Any) -> str:
    """The reason that the case is labelled with; with its line, where it names one."""
    lines, first = inspect.getsourcelines(inspect.unwrap(function))
    for number, line in enumerate(lines, first):
        if found := _LABEL.search(line):
            # "{-1}" is the line before.
            before = {f"{{-{by}}}": str(number - by) for by in range(1, 5)}
            reason = found["reason"]
            for written, meant in before.items():
                reason = reason.replace(written, meant)
            return f"line {number}: {reason}" if found["exact"] == "-" else reason
    raise AssertionError(f"{function.__qualname__} has no label")


NEAR_MISSES = [
    (rule, name)
    for rule in RULES
    for name, value in vars(cases(rule)).items()
    if inspect.isfunction(getattr(value, "__func__", value))
]


def test_there_are_enough_of_them() -> None:
    assert len(NEAR_MISSES) > 100


@pytest.mark.parametrize(("rule", "name"), NEAR_MISSES)
def test_a_near_miss_is_left_alone(rule: str, name: str) -> None:
    owner = cases(rule)
    value = getattr(owner, name)
    reason = rule_of(rule).why_not(value, owner)
    assert reason is not None, "it would be rewritten"
    assert label_of(spied_on(value)) in reason


def spied_on(value: Any) -> Any:
    """What a decorator of the cases has wrapped."""
    if value.__name__ != "call":
        return value
    return inspect.getclosurevars(value).nonlocals["function"]


# -- what a rule knows, in all spellings

SPELLED = {
    "residual_norm": (spellings.ResidualNorm, "torch_fused_add_rmsnorm"),
    "gated_product": (spellings.GatedProduct, "torch_fused_swiglu"),
    "qk_norm_rope": (spellings.QkNormRope, "torch_fused_qk_norm_rope"),
    "head_loss": (spellings.HeadLoss, "torch_fused_linear_cross_entropy"),
}
SPELLINGS = [
    (rule, name)
    for rule, (owner, _) in SPELLED.items()
    for name, value in vars(owner).items()
    if inspect.isfunction(value) and name != "__init__"
]


def inputs(rule: str) -> list[torch.Tensor]:
    """Arguments of the methods that spell a rule."""
    torch.manual_seed(0)
    if rule == "qk_norm_rope":
        q, k = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 1, 8)
        angles = torch.randn(1, 3, 4).repeat(1, 1, 2)
        return [q.requires_grad_(), k.requires_grad_(), angles.cos(), angles.sin()]
    x, y = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    return [x, torch.randint(0, 16, (2, 3))] if rule == "head_loss" else [x, y]


def results(function: Any, module: Any, rule: str) -> list[torch.Tensor]:
    """What a call gives: its tensors, and the gradients of its inputs and parameters."""
    given = inputs(rule)
    found = [one for one in tree_leaves(function(module, *given)) if torch.is_tensor(one)]
    if rule == "head_loss":
        found = list(dict(function(module, *given)).values())[:2]
    total = sum(one.double().square().sum() for one in found)
    wanted = [one for one in (*given, *module.parameters()) if one.requires_grad]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [one.detach() for one in (*found, *gradients)]


@pytest.mark.parametrize(("rule", "name"), SPELLINGS)
def test_a_spelling_is_rewritten_and_runs_as_before(rule: str, name: str) -> None:
    owner, kernel = SPELLED[rule]
    original = vars(owner)[name]
    request = Request(rule, registry.kernels()[kernel], explicit=True)
    assert why_not(original, owner, request) is None
    made = composed(original, owner, (request,), alone=False)
    torch.manual_seed(0)
    module = owner()
    eager = results(original, module, rule)
    site, calls = made.sites[request], Counter()
    # The original's expressions, and the very same numbers.
    for one, other in zip(results(made.function, module, rule), eager, strict=True):
        assert torch.equal(one, other)
    site.active, site.counters = True, [calls]
    try:
        fused = results(made.function, module, rule)
    finally:
        site.release()
    for one, other in zip(fused, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    reason = re.search(r"# <= (.*)", inspect.getsource(original))
    assert set(calls) == {fallback(reason[1]) if reason else SERVED}
    assert len(inspect.getsource(made.function).splitlines()) == len(
        inspect.getsource(original).splitlines()
    )


def test_all_rules_together_on_one_function() -> None:
    """An edit inside of what another rule edits, and two that begin at one place."""
    owner = spellings.ResidualNorm
    requests = tuple(
        Request(rule, registry.kernels()[SPELLED[rule][1]], explicit=True)
        for rule in ("residual_norm", "gated_product")
    )
    made = composed(owner.with_a_product, owner, requests, alone=False)
    module, calls = owner(), Counter()
    eager = results(owner.with_a_product, module, "residual_norm")
    for site in made.sites.values():
        site.active, site.counters = True, [calls]
    fused = results(made.function, module, "residual_norm")
    for site in made.sites.values():
        site.release()
    for one, other in zip(fused, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert calls == {SERVED: 2}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rotary_call_inside_of_the_norms_and_the_rotary(order: tuple[int, int]) -> None:
    """Both edit the rotary function's name."""
    owner = spellings.QkNormRope
    source, wide, _ = rule_of("qk_norm_rope").found_in(owner.plain, owner)
    _, narrow, _ = rule_of("leaf_call").found_in(owner.plain, owner)
    edits = [(wide.edits, narrow.edits)[place] for place in order]
    lines = edited(source, [*edits[0], *edits[1]])
    text = "qk_norm_rope(self, self.q_norm, self.k_norm, rope(self, apply_rotary_pos_emb), q, k,"
    assert text in "".join(lines)
