"""Calls of rotary functions that no kernel takes: the original runs, or says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import BaseKernel
from hf_kernel_patch.ops.rope.torch import rope
from hf_kernel_patch.recognition import known
from hf_kernel_patch.recognition import site as sites
from hf_kernel_patch.recognition.leaves.rotary import why_not_plain
from hf_kernel_patch.recognition.outcome import SERVED, fallback
from tests.recognition.leaves.rotary import (
    EVERY,
    Place,
    inputs,
    place_of,
    serving,
)
from tests.support.probes import fallbacks, served

pytestmark = pytest.mark.versions


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "counting", True)


# -- what is not served


def narrow(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return q, k, cos[..., :6], sin[..., :6]


def without_k(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return q, None, cos, sin


def unheard_of(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return q, k, cos, sin, 7


@pytest.mark.parametrize("change", [narrow, without_k, unheard_of])
@pytest.mark.parametrize("family", ["llama", "olmo2", "cohere", "helium", "deepseek_v3"])
def test_the_original_s_error_stays_an_error(family: str, change: Callable[..., Any]) -> None:
    place = place_of(family)
    function, _ = serving(place)
    given = change(*inputs(place))
    options = {} if len(given) == 4 else {"unsqueeze_dim": given[4]}
    with pytest.raises(Exception) as expected:
        place.original(*given[:4], **options)
    with pytest.raises(type(expected.value)):
        function(*given[:4], **options)


def of_every_head(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    """As broadcast, not shared by the heads."""
    return q, k, cos.expand(q.shape[0], -1, -1)[:, None], sin.expand(q.shape[0], -1, -1)[:, None]


def test_angles_of_other_dimensions_go_back() -> None:
    place = place_of("sam3")
    function, calls = serving(place)
    given = of_every_head(*inputs(place))
    assert all(map(torch.equal, function(*given), place.original(*given)))
    assert calls == {fallback("cos and sin are not of two dimensions"): 1}


@pytest.mark.parametrize("more", [(1, False), (0, True)])
def test_tokens_that_k_alone_has_go_back(more: tuple[int, bool]) -> None:
    place = place_of("sam2_video")
    function, calls = serving(place)
    q, k, cos, sin = inputs(place)
    k = torch.cat((k, k[:, :, :1] if more[0] else k), dim=-2)
    given = q, k, cos[None], sin[None], *more
    assert all(map(torch.equal, function(*given), place.original(*given)))
    assert calls == {fallback("k has other tokens than q"): 1}


def test_a_prefix_that_q_alone_has_goes_back() -> None:
    place = place_of("dinov3_vit")
    function, calls = serving(place)
    q, k, cos, sin = inputs(place)
    with pytest.raises(RuntimeError):
        function(q, k[:, :, :4], cos, sin)
    assert SERVED not in calls
    # and without a prefix
    found = function(q, k, cos.repeat(2, 1)[:5], sin.repeat(2, 1)[:5])
    expected = place.original(q, k, cos.repeat(2, 1)[:5], sin.repeat(2, 1)[:5])
    assert all(map(torch.equal, found, expected))
    assert calls[SERVED] == 1


def six(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1, cast: bool = False) -> Any:
    """A kernel that somebody wrote before there were more arguments."""
    return rope(q, k, cos, sin, unsqueeze_dim, cast)


class Older(BaseKernel):
    kernel_id = "older"
    op = "rope"
    function = six


OLDER = fallback("older takes no pairs, angles and upcast, nor q alone")


@pytest.mark.parametrize(
    ("family", "outcome"),
    [
        ("llama", SERVED),
        ("phi3", SERVED),
        ("olmo2", SERVED),
        ("qwen4_exp", SERVED),
        ("cohere", OLDER),
        ("gemma3n", OLDER),
        ("deepseek_v3", OLDER),
        ("modernbert", OLDER),
    ],
)
def test_a_kernel_that_knows_six_arguments_serves_what_they_say(family: str, outcome: Any) -> None:
    place = place_of(family)
    function, calls = serving(place, Older)
    given = inputs(place)
    found, expected = function(*given), place.original(*given)
    if isinstance(expected, tuple):
        assert all(map(torch.equal, found, expected))
    else:
        assert torch.equal(found, expected)
    assert calls == {outcome: 1}


def test_of_a_kernel_that_knows_six_arguments_q_alone_goes_back() -> None:
    place = place_of("qwen4_exp")
    function, calls = serving(place, Older)
    given = inputs(place, one=True)
    assert torch.equal(function(*given), place.original(*given))
    assert calls == {OLDER: 1}


# -- text that is the same, over another helper


def test_the_sign_of_nanochat_is_no_leaf() -> None:
    place = Place("", "nanochat", versions=">=5")
    reasons = [
        one.why_not(place.original, place.module) for one in known().values() if one.op == "rope"
    ]
    assert all(reasons)
    assert any("rotate_half in" in str(reason) for reason in reasons)


@EVERY
def test_only_the_plain_ones_are_plain(place: Place) -> None:
    assert (why_not_plain(place.original) is None) == (place.leaf in ("rope.full", "rope.partial"))


@pytest.mark.parametrize(
    ("family", "helper"),
    [("glm", "rotate_half"), ("sam3", "rotate_pairwise"), ("pe_audio", "stack_freqs")],
)
def test_a_helper_that_is_replaced_later_runs(
    family: str, helper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(family)
    original, module = place.original, place.module
    given, plain = inputs(place), getattr(module, helper)

    def doubled(*arguments: Any) -> Any:
        return 2 * plain(*arguments)

    with hf_kernel_patch.patched("rope", models=family, strict=True) as report:
        monkeypatch.setattr(module, helper, doubled)
        expected = original(*given)
        assert all(map(torch.equal, getattr(module, place.function)(*given), expected))
        assert not served(report)
        assert any(f"{helper} was replaced by" in why for why in fallbacks(report))
        monkeypatch.undo()
        getattr(module, place.function)(*given)
        assert served(report) == 1
