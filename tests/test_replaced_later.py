"""What fused code takes the place of, and somebody replaces while a patch is in force."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import hf_kernel_patch
from tests.probes import handed_back, logits, served
from tests.tiny import modelling, tiny_model

# architecture, op, where the function stands in the modelling module, reason of the fallback
HELPERS = [
    ("llama", "rope", "rotate_half", "rotate_half was replaced by"),
    ("qwen3", "qk_norm_rope", "rotate_half", "rotate_half of the rotary function was replaced"),
    ("qwen3", "qk_norm_rope", "apply_rotary_pos_emb", "no leaf rope.full or rope.partial"),
    ("gemma2", "rms_norm", "Gemma2RMSNorm._norm", "_norm was replaced by"),
    ("gemma2", "add_rms_norm", "Gemma2RMSNorm._norm", "is not a norm of a known leaf"),
]


def globally(model: Any, name: str, op: str) -> None:
    hf_kernel_patch.patch_transformers(op, models=name, backend="torch", strict=True)


def alone(model: Any, name: str, op: str) -> None:
    hf_kernel_patch.apply_default_kernels(model, op)


@pytest.mark.parametrize("scope", [globally, alone])
@pytest.mark.parametrize(("name", "op", "helper", "reason"), HELPERS)
def test_a_helper_that_is_replaced_later_runs_and_is_named(
    name: str,
    op: str,
    helper: str,
    reason: str,
    scope: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, module = tiny_model(name).eval(), modelling(name)
    owner, _, attribute = helper.rpartition(".")
    holder = getattr(module, owner) if owner else module
    original = getattr(holder, attribute)

    def doubled(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        return tuple(2 * x for x in found) if isinstance(found, tuple) else 2 * found

    monkeypatch.setattr(holder, attribute, doubled)
    expected = logits(model)
    monkeypatch.undo()
    plain = logits(model)
    assert not torch.equal(expected, plain)
    hf_kernel_patch.count_calls()
    scope(model, name, op)
    torch.testing.assert_close(logits(model), plain)
    calls = served(hf_kernel_patch.status())
    assert calls
    monkeypatch.setattr(holder, attribute, doubled)
    torch.testing.assert_close(logits(model), expected)
    assert any(reason in why for why in handed_back(hf_kernel_patch.status()))
    assert served(hf_kernel_patch.status()) == calls
    monkeypatch.undo()
    torch.testing.assert_close(logits(model), plain)
    assert served(hf_kernel_patch.status()) == 2 * calls
    hf_kernel_patch.unpatch()


def test_accelerate_s_hooks_that_are_taken_off_leave_nothing_of_ours() -> None:
    model = tiny_model("llama").eval()
    eager = logits(model)
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    hf_kernel_patch.apply_default_kernels(model, "rms_norm,swiglu")
    twin = copy.deepcopy(model)
    hf_kernel_patch.count_calls()
    for module in model.modules():
        remove_hook_from_module(module)
    report = hf_kernel_patch.status()
    hf_kernel_patch.unpatch(model)
    before = served(report)
    torch.testing.assert_close(logits(model), eager)
    assert served(report) == before
    hf_kernel_patch.unpatch(twin)
