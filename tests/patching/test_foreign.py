"""Somebody else's patches: over ours, under ours, between ours."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import ForeignPatchError, KernelPatchError, KernelPatchWarning
from hf_kernel_patch.patching import watching
from hf_kernel_patch.patching.ledger import ledger
from tests.support.probes import (
    LAYERS,
    NORM,
    ROPE,
    changed,
    llama,
    logits,
    places,
    served,
    watched_kernel,
)
from tests.support.tiny import tiny_model


@pytest.fixture(autouse=True)
def before() -> Iterator[dict[str, Any]]:
    """Llama's places; what a test's foreign patch leaves there is put right again."""
    objects = places() if llama() else {}
    forward, rotary = llama().LlamaRMSNorm.forward, llama().apply_rotary_pos_emb
    yield objects
    llama().LlamaRMSNorm.forward, llama().apply_rotary_pos_emb = forward, rotary


def over(function: Any) -> Any:
    """A foreign patch as they are written: a wrapper that does something and calls on."""

    @functools.wraps(function)
    def foreign_wrapper(*args: Any, **kwargs: Any) -> Any:
        foreign_wrapper.calls += 1
        return function(*args, **kwargs)

    foreign_wrapper.calls = 0
    return foreign_wrapper


def foreign_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A foreign replacement."""
    return hidden_states * 2


def test_a_foreign_patch_over_a_class_stays_and_is_named_once(before: dict[str, Any]) -> None:
    model = tiny_model("llama")
    eager = logits(model)
    with watched_kernel() as watched:
        hf_kernel_patch.patch_transformers(("own_rmsnorm", *LAYERS[1:]), models="llama")
        foreign = over(llama().LlamaRMSNorm.forward)
        llama().LlamaRMSNorm.forward = foreign
        assert torch.equal(logits(model), eager)
        assert (foreign.calls, watched.calls) == (5, 5)
        with pytest.raises(ForeignPatchError) as raised:
            hf_kernel_patch.unpatch()
        message = str(raised.value)
        assert message.count("LlamaRMSNorm.forward") >= 1
        assert __name__ in message
        assert "rotary" not in message
        assert changed(before) == {"LlamaRMSNorm.forward"}
        assert llama().LlamaRMSNorm.forward is foreign
        hf_kernel_patch.unpatch()  # said once
        assert torch.equal(logits(model), eager)
        assert (foreign.calls, watched.calls) == (10, 5)


def test_a_foreign_patch_over_a_function_stays_and_is_named(before: dict[str, Any]) -> None:
    model = tiny_model("llama")
    eager = logits(model)
    hf_kernel_patch.patch_transformers((NORM, ROPE), models="llama")
    llama().apply_rotary_pos_emb = foreign = over(llama().apply_rotary_pos_emb)
    with pytest.raises(ForeignPatchError, match=rf"modeling_llama\.apply_rotary.*{__name__}"):
        hf_kernel_patch.unpatch()
    assert llama().apply_rotary_pos_emb is foreign
    assert changed(before) == {"apply_rotary_pos_emb"}
    assert torch.equal(logits(model), eager)
    assert foreign.calls == 2


def test_a_foreign_patch_that_leaves_first_is_no_hindrance(before: dict[str, Any]) -> None:
    with hf_kernel_patch.patched(NORM, models="llama"):
        ours = llama().LlamaRMSNorm.forward
        llama().LlamaRMSNorm.forward = over(ours)
        llama().LlamaRMSNorm.forward = ours
    assert changed(before) == set()


def test_a_foreign_patch_that_leaves_later_puts_back_what_delegates() -> None:
    model = tiny_model("llama")
    eager = logits(model)
    hf_kernel_patch.count_calls()
    hf_kernel_patch.patch_transformers(NORM, models="llama")
    stale = llama().LlamaRMSNorm.forward
    llama().LlamaRMSNorm.forward = over(stale)
    with pytest.raises(ForeignPatchError):
        hf_kernel_patch.unpatch()
    llama().LlamaRMSNorm.forward = stale
    assert torch.equal(logits(model), eager)
    with hf_kernel_patch.patched(NORM, models="llama", strict=True) as report:
        logits(model)
        assert served(report) == 5
    logits(model)
    assert served(report) == 5
    assert llama().LlamaRMSNorm.forward is stale


def test_leaving_a_block_under_a_foreign_patch_raises() -> None:
    with (
        pytest.raises(ForeignPatchError, match=rf"LlamaRMSNorm\.forward.*{__name__}"),
        hf_kernel_patch.patched(NORM, models="llama"),
    ):
        llama().LlamaRMSNorm.forward = over(llama().LlamaRMSNorm.forward)
    assert not hf_kernel_patch.status().rows


def test_an_exception_inside_a_block_is_not_hidden_by_a_foreign_patch() -> None:
    with pytest.raises(KeyError) as raised, hf_kernel_patch.patched(NORM, models="llama"):
        llama().LlamaRMSNorm.forward = over(llama().LlamaRMSNorm.forward)
        raise KeyError("inside")
    assert "could not restore: LlamaRMSNorm.forward" in "".join(raised.value.__notes__)


def test_replacing_a_patch_under_a_foreign_one_raises_and_is_in_force(
    before: dict[str, Any],
) -> None:
    hf_kernel_patch.patch_transformers(NORM, models="llama")
    llama().LlamaRMSNorm.forward = foreign = over(llama().LlamaRMSNorm.forward)
    with pytest.raises(ForeignPatchError, match=r"LlamaRMSNorm\.forward"):
        hf_kernel_patch.patch_transformers(ROPE, models="llama")
    assert {row.op for row in hf_kernel_patch.status()} == {"rope"}
    assert changed(before) == {"LlamaRMSNorm.forward", "apply_rotary_pos_emb"}
    assert llama().LlamaRMSNorm.forward is foreign
    hf_kernel_patch.unpatch()
    assert changed(before) == {"LlamaRMSNorm.forward"}


def test_a_block_inside_a_foreign_patch_over_ours_leaves_both(before: dict[str, Any]) -> None:
    hf_kernel_patch.patch_transformers(NORM, models="llama")
    llama().LlamaRMSNorm.forward = foreign = over(llama().LlamaRMSNorm.forward)
    with (
        pytest.warns(KernelPatchWarning, match=rf"LlamaRMSNorm\.forward is not .*{__name__}"),
        hf_kernel_patch.patched((NORM, ROPE), models="llama") as report,
    ):
        assert [row.op for row in report.patched] == ["rope"]
        assert llama().LlamaRMSNorm.forward is foreign
    assert llama().LlamaRMSNorm.forward is foreign
    with pytest.raises(ForeignPatchError):
        hf_kernel_patch.unpatch()


@pytest.mark.parametrize("make", [over, lambda original: foreign_forward], ids=["over", "instead"])
def test_a_foreign_patch_under_ours_is_kept_and_named(make: Any) -> None:
    llama().LlamaRMSNorm.forward = foreign = make(llama().LlamaRMSNorm.forward)
    objects = places()
    with pytest.warns(KernelPatchWarning, match=rf"LlamaRMSNorm\.forward is not .*{__name__}"):
        report = hf_kernel_patch.patch_transformers((NORM, ROPE), models="llama")
    assert changed(objects) == {"apply_rotary_pos_emb"}
    assert [row.op for row in report.patched] == ["rope"]
    assert __name__ in report.skipped[0].reason
    hf_kernel_patch.unpatch()
    assert llama().LlamaRMSNorm.forward is foreign
    with pytest.raises(KernelPatchError, match=__name__):
        hf_kernel_patch.patch_transformers(NORM, models="llama", strict=True)
    assert changed(objects) == set()


def test_a_foreign_function_under_ours_is_kept_and_named() -> None:
    llama().apply_rotary_pos_emb = foreign = over(llama().apply_rotary_pos_emb)
    model = tiny_model("llama")
    with (
        pytest.warns(KernelPatchWarning, match=rf"apply_rotary_pos_emb is not .*{__name__}"),
        hf_kernel_patch.patched((NORM, ROPE), models="llama"),
    ):
        logits(model)
        assert llama().apply_rotary_pos_emb is foreign
    assert foreign.calls == 2
    assert llama().apply_rotary_pos_emb is foreign


def test_a_class_that_somebody_put_in_place_of_another_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(torch.nn.Module):
        forward = foreign_forward

    monkeypatch.setattr(llama(), "LlamaRMSNorm", Other)
    with pytest.warns(KernelPatchWarning, match=rf"LlamaRMSNorm\.forward is not .*{__name__}"):
        hf_kernel_patch.patch_transformers(NORM, models="llama")
    assert Other.forward is foreign_forward
    hf_kernel_patch.unpatch()


def test_a_forward_that_somebody_deleted_is_said_and_not_invented() -> None:
    original = llama().LlamaRMSNorm.forward
    hf_kernel_patch.patch_transformers((NORM, ROPE), models="llama")
    del llama().LlamaRMSNorm.forward
    with pytest.raises(ForeignPatchError, match=r"LlamaRMSNorm\.forward"):
        hf_kernel_patch.unpatch()
    assert "forward" not in vars(llama().LlamaRMSNorm)
    llama().LlamaRMSNorm.forward = original


def test_nothing_of_ours_is_remembered_after_a_foreign_patch() -> None:
    hf_kernel_patch.patch_transformers(NORM, models="llama")
    llama().LlamaRMSNorm.forward = over(llama().LlamaRMSNorm.forward)
    with pytest.raises(ForeignPatchError):
        hf_kernel_patch.unpatch()
    assert not ledger._stacks
    assert not watching.active
