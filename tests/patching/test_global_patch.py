"""What is put in place, everywhere it is held, and what happens to whoever captured it."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import hf_kernel_patch
from hf_kernel_patch import Architecture, KernelPatchError, KernelPatchWarning
from hf_kernel_patch.models import architectures
from tests.support.probes import (
    LAYERS,
    NORM,
    ROPE,
    SWIGLU,
    changed,
    llama,
    logits,
    places,
    served,
    watched_kernel,
)
from tests.support.tiny import modelling, tiny_model


@pytest.fixture
def held_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A user's module that has imported Llama's names under names of its own."""
    source = (
        "from transformers.models.llama.modeling_llama import LlamaRMSNorm as Norm\n"
        "from transformers.models.llama.modeling_llama import apply_rotary_pos_emb\n"
        "rotate = apply_rotary_pos_emb\n"
    )
    (tmp_path / "held_elsewhere.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("held_elsewhere")
    del sys.modules["held_elsewhere"]


def rotary_arguments() -> tuple[torch.Tensor, ...]:
    """q (2, 4, 5, 8), k (2, 2, 5, 8), cos and sin (2, 5, 8)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_functions_are_replaced_in_every_module_that_holds_them(held_elsewhere: Any) -> None:
    original, norm = llama().apply_rotary_pos_emb, held_elsewhere.Norm
    other = modelling("qwen2").apply_rotary_pos_emb
    holders = (llama(), "apply_rotary_pos_emb"), (held_elsewhere, "apply_rotary_pos_emb")
    holders += ((held_elsewhere, "rotate"),)
    with hf_kernel_patch.patched(LAYERS, models="llama"):
        ours = {getattr(module, name) for module, name in holders}
        assert len(ours) == 1
        assert original not in ours
        assert held_elsewhere.Norm is llama().LlamaRMSNorm is norm
        assert modelling("qwen2").apply_rotary_pos_emb is other
    assert all(getattr(module, name) is original for module, name in holders)


def test_a_subclass_that_inherits_the_forward_is_served_and_one_with_its_own_is_not() -> None:
    base = llama().LlamaRMSNorm

    class Inherits(base):  # type: ignore[misc, valid-type]
        pass

    class Extends(base):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Any) -> Any:
            return super().forward(hidden_states) + 1

    class Replaces(base):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Any) -> Any:
            return hidden_states

    x = torch.randn(2, 8)
    with watched_kernel() as watched, hf_kernel_patch.patched("own_rmsnorm", models="llama"):
        plain = base(8)(x)
        assert torch.equal(Inherits(8)(x), plain)
        assert torch.equal(Extends(8)(x), plain + 1)
        assert watched.calls == 3
        assert Replaces(8)(x) is x
        assert watched.calls == 3
    assert "forward" not in vars(Inherits)


def test_a_name_imported_while_patched_delegates_afterwards() -> None:
    arguments = rotary_arguments()
    eager = llama().apply_rotary_pos_emb(*arguments)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(ROPE, models="llama") as report:
        captured = llama().apply_rotary_pos_emb
        captured(*arguments)
        assert served(report) == 1
    for left, right in zip(captured(*arguments), eager):
        assert torch.equal(left, right)
    assert served(report) == 1
    with hf_kernel_patch.patched(ROPE, models="llama") as report:
        captured(*arguments, unsqueeze_dim=1)
        assert served(report) == 1


def test_a_forward_captured_while_patched_delegates_afterwards() -> None:
    norm, x = llama().LlamaRMSNorm(8), torch.randn(2, 8)
    eager = norm(x)
    with watched_kernel() as watched:
        with hf_kernel_patch.patched("own_rmsnorm", models="llama"):
            bound, plain = norm.forward, llama().LlamaRMSNorm.forward
            assert torch.equal(bound(x), eager)
        assert watched.calls == 1
        assert torch.equal(bound(x), eager)
        assert torch.equal(plain(norm, x), eager)
        assert watched.calls == 1


def test_an_inner_replacement_that_was_captured_delegates_to_the_original() -> None:
    norm, x = llama().LlamaRMSNorm(8), torch.randn(2, 8)
    with (
        watched_kernel("outer") as outer,
        watched_kernel("inner") as inner,
        hf_kernel_patch.patched("outer", models="llama"),
    ):
        with hf_kernel_patch.patched("inner", models="llama"):
            captured = norm.forward
        captured(x)
        assert (outer.calls, inner.calls) == (0, 0)


def test_an_instance_keeps_a_captured_forward_and_is_served_again_later() -> None:
    norm, x = llama().LlamaRMSNorm(8), torch.randn(2, 8)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(NORM, models="llama"):
        norm.forward = captured = norm.forward
    with hf_kernel_patch.patched(NORM, models="llama", strict=True) as report:
        norm(x)
        assert (served(report), report.rows[0].outcome) == (1, "patched")
    assert norm.forward is captured


@pytest.mark.parametrize("name", ["LlamaRMSNorm.forward", "LlamaMLP.forward"])
def test_a_replacement_looks_like_the_original(name: str) -> None:
    owner = getattr(llama(), name.split(".")[0])
    original = owner.forward
    with hf_kernel_patch.patched(LAYERS, models="llama"):
        ours = owner.forward
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(ours, attribute) == getattr(original, attribute)
        assert inspect.signature(ours) == inspect.signature(original)
        stored = pickle.dumps(ours)
        assert pickle.loads(stored) is ours
    assert pickle.loads(stored) is original


def test_the_rotary_replacement_has_the_signature_of_this_version() -> None:
    code = getattr(llama().apply_rotary_pos_emb, "__wrapped__", llama().apply_rotary_pos_emb)
    if isinstance(code, nn.Module):
        pytest.skip("with `kernels` the original is a module, whose signature says nothing")
    with hf_kernel_patch.patched(ROPE, models="llama"):
        ours = llama().apply_rotary_pos_emb
        assert inspect.signature(ours) == inspect.signature(code)
        stored = pickle.dumps(ours)
    assert pickle.loads(stored) is llama().apply_rotary_pos_emb


@pytest.mark.skipif(
    not isinstance(llama().apply_rotary_pos_emb, nn.Module),
    reason="only `kernels` beside transformers 5.15 to 5.22 makes it a module",
)
def test_the_module_that_kernels_makes_of_the_rotary_function_comes_back() -> None:
    before, arguments = llama().apply_rotary_pos_emb, rotary_arguments()
    state = dict(vars(before))
    eager = before(*arguments)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched(ROPE, models="llama", strict=True) as report:
        assert not isinstance(llama().apply_rotary_pos_emb, nn.Module)
        for left, right in zip(llama().apply_rotary_pos_emb(*arguments), eager):
            assert torch.equal(left, right)
        assert served(report) == 1
        logits(tiny_model("llama"))
        assert served(report) == 3
    assert llama().apply_rotary_pos_emb is before
    assert vars(before) == state


@pytest.fixture
def wrong_tables() -> Iterator[None]:
    """Tables that expect other code than there is."""
    module = llama().__name__
    tables = {
        "gone": {"LlamaNorm.forward": "rms_norm.llama"},
        "gone_too": {"LlamaRMSNorm.run": "rms_norm.llama"},
        "other": {
            "LlamaRMSNorm.forward": "rms_norm.gemma",
            "LlamaAttention.forward": "gated_product",
        },
        "half": {
            "LlamaRMSNorm.forward": "rms_norm.llama",
            "LlamaAttention.forward": "gated_product",
        },
    }
    for name, rows in tables.items():
        hf_kernel_patch.register_model(Architecture(name, rows, module=module))
    yield
    for name in tables:
        del architectures()[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone", "modeling_llama has no LlamaNorm"),
        ("gone_too", r"modeling_llama has no LlamaRMSNorm\.run"),
        ("other", r"modeling_llama has other code than the leaf rms_norm\.gemma"),
        ("half", "modeling_llama: no code that the rule gated_product knows"),
    ],
)
def test_a_target_that_does_not_match_is_never_patched(
    name: str, reason: str, wrong_tables: None
) -> None:
    before = places()
    with pytest.warns(KernelPatchWarning, match=reason):
        report = hf_kernel_patch.patch_transformers((NORM, SWIGLU), models=name)
    assert changed(before) == ({"LlamaRMSNorm.forward"} if name == "half" else set())
    assert all(row.reason for row in report.skipped)
    assert len(report.patched) == (name == "half")
    hf_kernel_patch.unpatch()
    with pytest.raises(KernelPatchError, match=reason):
        hf_kernel_patch.patch_transformers((NORM, SWIGLU), models=name, strict=True)
    assert changed(before) == set()


def test_a_function_whose_helper_is_another_is_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[..., 1::2], -x[..., ::2]), dim=-1)

    monkeypatch.setattr(llama(), "rotate_half", rotate_half)
    before = places()
    with pytest.warns(KernelPatchWarning, match="rotate_half in .*modeling_llama is another"):
        hf_kernel_patch.patch_transformers((NORM, ROPE), models="llama")
    assert changed(before) == {"LlamaRMSNorm.forward"}
    hf_kernel_patch.unpatch()


def test_patching_that_matches_warns_of_nothing() -> None:
    llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hf_kernel_patch.patched(LAYERS, models="llama"):
            pass


def test_instances_are_never_compared() -> None:
    class Equal(llama().LlamaRMSNorm):  # type: ignore[misc, name-defined]
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("compared")

        __hash__ = nn.Module.__hash__

    norm = Equal(8)
    norm.forward = MethodType(llama().LlamaRMSNorm.forward, norm)
    with watched_kernel() as watched, hf_kernel_patch.patched("own_rmsnorm", models="llama"):
        norm(torch.randn(2, 8))
        assert watched.calls == 1
