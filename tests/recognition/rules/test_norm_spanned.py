"""Which norms the rules may span that fuse a norm with its neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.recognition.leaves.norms import norm_arguments, norm_of, norms_in
from hf_kernel_patch.recognition.outcome import SERVED, fallback
from hf_kernel_patch.recognition.rules.residual_norm import serve
from hf_kernel_patch.recognition.site import Site
from tests.support.norm_originals import EACH, EPS, WIDTH, Norm
from tests.support.ops.inputs import draw
from tests.support.tiny import modelling

pytestmark = pytest.mark.versions
every = pytest.mark.parametrize("name", EACH)


def spanned(one: Norm) -> tuple[Any, str | None]:
    norm = one.made()
    return norm_arguments(norm, norms_in(one.modelling()))


#: Leaf -> (offset, cast_first), or what the rules are told.
SPANNED: dict[str, Any] = {
    "rms_norm.olmo2": (0.0, False),
    "rms_norm.moshi": (0.0, False),
    "rms_norm.llama4": (0.0, True),
    "rms_norm.gemma4": (0.0, False),
    "rms_norm.qwen4": (1.0, False),
    "rms_norm.t5": "no op spans, rms_norm.t5",
    "rms_norm.cpmant": "no op spans, rms_norm.cpmant",
    "rms_norm.nanochat": "no op spans, rms_norm.nanochat",
    "rms_norm.deepseek_v4": "no op spans, rms_norm.deepseek_v4",
    "rms_norm.inkling2": "no op spans, rms_norm.inkling2",
    "rms_norm.gated": "not a norm of a known leaf",
    "rms_norm.gate_first": "not a norm of a known leaf",
}


@every
def test_rules_span_a_norm_only_if_their_ops_can_express_it(name: str) -> None:
    one = EACH[name]
    (weight, eps, *options), why_not = spanned(one)
    wanted = SPANNED[one.leaf]
    if one.given.get("with_scale") is False:
        wanted = "the norm has no weight"
    elif one.given.get("group_size") and one.leaf == "rms_norm.qwen4":
        wanted = "the norm is one by groups"
    if isinstance(wanted, str):
        assert wanted in str(why_not)
        assert weight is None
    else:
        assert why_not is None
        assert (weight.shape, eps, *options) == ((WIDTH,), EPS, *wanted)
    assert (norm_of(one.kind()) is None) == isinstance(SPANNED[one.leaf], str)


def test_rules_do_not_span_a_norm_with_a_method_of_its_own() -> None:
    one = EACH["Llama4TextRMSNorm"]
    norm = one.made()
    known = norms_in(one.modelling())
    assert norm_arguments(norm, known)[1] is None
    norm._norm = lambda x: x
    assert "_norm of its own" in str(norm_arguments(norm, known)[1])


@pytest.mark.parametrize("scale", [True, False])
def test_norms_of_a_layer_with_and_without_a_scale(scale: bool) -> None:
    """The rule of a sum and its norm, on a norm that has a weight if asked."""
    name = f"Gemma3nRMSNorm {scale}"
    if name not in EACH:
        pytest.skip("its norm is an other one")
    one = EACH[name]
    kernel = registry.kernels()["torch_fused_add_rmsnorm"]
    site, calls = Site(kernel, one.kind().forward, explicit=True), Counter[str]()
    add_rms_norm: Callable[..., Any] = serve(site)
    site.active, site.counters = True, [calls]
    norm, x, y = one.made(), draw((2, WIDTH)), draw((2, WIDTH), seed=1)
    hf_kernel_patch.count_calls()
    found = add_rms_norm(torch.nn.Module(), norm, x, y)
    site.release()
    assert torch.equal(found[1], norm(x + y))
    assert calls == ({SERVED: 1} if scale else {fallback("the norm has no weight"): 1})


def test_whole_numbers_are_added_by_the_original() -> None:
    kernel = registry.kernels()["torch_fused_add_rmsnorm"]
    norm, x = modelling("llama").LlamaRMSNorm(4), torch.arange(8).view(2, 4)
    assert "floating point" in str(kernel.why_fallback(x, x, norm.weight, EPS))
    assert "floating point" in str(kernel.why_fallback(x.float(), x, norm.weight, EPS))
