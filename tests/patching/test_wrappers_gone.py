"""A wrapper that somebody put around our function, and took away, is not blamed later."""

from __future__ import annotations

import pytest
from transformers.utils.deprecation import deprecate_kwarg

import hf_kernel_patch
from hf_kernel_patch import registry
from tests.support.tiny import modelling

KERNEL = "torch_fused_add_rmsnorm"


def test_a_wrapper_that_is_gone_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = modelling("llama").LlamaDecoderLayer  # that of now: other tests reload the module
    original = layer.forward
    with hf_kernel_patch.patched(KERNEL, models="llama"):
        ours = layer.forward
        layer.forward = deprecate_kwarg("formerly", version="99.0.0")(ours)
        with hf_kernel_patch.patched(KERNEL, models="llama") as report:
            assert [row.outcome for row in report] == ["patched"], "around the wrapper"
        layer.forward = ours
    assert layer.forward is original
    del ours
    cls = type("Another", (registry.kernels()[KERNEL],), {"kernel_id": "another"})
    monkeypatch.setitem(registry.kernels(), "another", cls)  # for which another function is made
    with hf_kernel_patch.patched("another", models="llama", strict=True) as report:
        assert [row.outcome for row in report] == ["patched"]
