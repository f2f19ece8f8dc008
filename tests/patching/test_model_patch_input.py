"""What may be asked for one model, by argument, config and environment, and what is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import (
    KernelPatchWarning,
    apply_default_kernels,
    apply_kernel,
    registry,
    unpatch,
)
from hf_kernel_patch.patching import modules
from tests.support.scope import MOE, NORM, ROPE, SWIGLU, same, state
from tests.support.tiny import layer_ops_of, modelling, tiny_model


def defaults() -> set[str]:
    """The ops that "auto" takes here."""
    return {registry.kernels()[kernel_id].op for kernel_id in hf_kernel_patch.get_default_kernels()}


LLAMA_DEFAULTS = defaults() & set(layer_ops_of("llama"))
# include_kernels -> the ops that a Llama then has
INCLUDE: list[tuple[Any, set[str]]] = [
    ("auto", LLAMA_DEFAULTS),
    (True, LLAMA_DEFAULTS),
    ("true", LLAMA_DEFAULTS),
    (None, set()),
    (False, set()),
    ("null", set()),
    ("false", set()),
    (NORM, {"rms_norm"}),
    (f"{NORM},{ROPE}", {"rms_norm", "rope"}),
    (f" {NORM} , swiglu ", {"rms_norm", "swiglu"}),
    ([ROPE], {"rope"}),
]


@pytest.mark.parametrize(("include", "ops"), INCLUDE, ids=[repr(row[0]) for row in INCLUDE])
def test_include_kernels_chooses(include: Any, ops: set[str]) -> None:
    model = tiny_model("llama")
    assert apply_default_kernels(model, include_kernels=include) is model
    assert {row.op for row in hf_kernel_patch.status()} == ops
    unpatch(model)
    assert apply_default_kernels(model, include) is model
    assert {row.op for row in hf_kernel_patch.status()} == ops
    unpatch()


@pytest.mark.parametrize(
    ("text", "ops"),
    [
        ("kernel_config:\n  name: auto\n  include_kernels: auto\n", LLAMA_DEFAULTS),
        ("kernel_config:\n  name: auto\n", set()),
        (f"name: auto\ninclude_kernels: {NORM},{SWIGLU}\n", {"rms_norm", "swiglu"}),
        (f"name: {ROPE}\n", {"rope"}),
        ("include_kernels: auto\nexclude: rope\n", LLAMA_DEFAULTS - {"rope"}),
    ],
)
def test_a_config_chooses(text: str, ops: set[str], tmp_path: Path) -> None:
    path = tmp_path / "kernels.yaml"
    path.write_text(text, encoding="utf-8")
    model = tiny_model("llama")
    for config in (path, str(path), hf_kernel_patch.load_kernel_config(path)):
        apply_default_kernels(model, config=config)
        assert {row.op for row in hf_kernel_patch.status()} == ops
        unpatch(model)


def test_an_argument_wins_over_a_config() -> None:
    model = tiny_model("llama")
    apply_default_kernels(model, ROPE, config={"include_kernels": NORM})
    assert {row.op for row in hf_kernel_patch.status()} == {"rope"}
    unpatch(model)


def test_the_variable_that_switches_off_wins_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH_DISABLE", "1")
    model = tiny_model("llama")
    before = state(model)
    assert apply_kernel(NORM, model=model) is model
    assert apply_default_kernels(model, "auto") is model
    assert same(state(model), before)


# -- bad input


@pytest.mark.parametrize(
    "model", [torch.nn.Linear(2, 2), None, "llama", object(), torch.nn.Linear, tiny_model]
)
def test_what_is_no_pretrained_model_is_a_type_error(model: Any) -> None:
    for call in (
        lambda: apply_kernel(NORM, model=model),
        lambda: apply_default_kernels(model),
        lambda: apply_default_kernels(model, None),
    ):
        with pytest.raises(TypeError, match="PreTrainedModel"):
            call()


def test_the_class_of_a_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel"):
        apply_kernel(NORM, model=modelling("llama").LlamaForCausalLM)


def test_a_module_that_wraps_a_model_is_one() -> None:
    model = tiny_model("llama")
    wrapper = torch.nn.Sequential(model)
    before = state(model)
    assert apply_kernel(NORM, model=wrapper) is wrapper
    assert not same(state(model), before)
    unpatch(wrapper)
    assert same(state(model), before)


@pytest.mark.parametrize("call", [lambda i, m: apply_kernel(i, model=m), None])
def test_an_unknown_id_is_a_value_error_with_the_near_matches(call: Any) -> None:
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(
        ValueError, match=r"torch_fused_rmsnorms.*did you mean.*torch_fused_rmsnorm'"
    ):
        (call or (lambda i, m: apply_default_kernels(m, i)))("torch_fused_rmsnorms", model)
    with pytest.raises(TypeError, match="kernel_id must be a string"):
        apply_kernel(None, model=model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not a string"):
        apply_default_kernels(model, [3])
    assert same(state(model), before)


def test_a_kernel_without_a_site_warns_and_returns_the_model() -> None:
    model = tiny_model("llama")
    before = state(model)
    with pytest.warns(KernelPatchWarning, match=f"{MOE} found no site in this LlamaForCausalLM"):
        assert apply_kernel(MOE, model=model) is model
    assert same(state(model), before)


def test_defaults_without_a_site_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    apply_default_kernels(tiny_model("llama"))
    assert not [w for w in recwarn if issubclass(w.category, KernelPatchWarning)]
    unpatch()


def test_an_unavailable_kernel_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = registry.kernels()[NORM]
    monkeypatch.setattr(kernel, "check_device", classmethod(lambda cls: "no such device here"))
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(hf_kernel_patch.KernelUnavailableError, match="no such device here"):
        apply_kernel(NORM, model=model)
    assert same(state(model), before)


def test_an_error_halfway_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("injected")
        return original(*arguments)

    original = modules.subclass
    monkeypatch.setattr(modules, "subclass", failing)
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(RuntimeError, match="injected"):
        apply_default_kernels(model)
    assert same(state(model), before)
    assert not hf_kernel_patch.status().rows


def test_a_forward_that_somebody_binds_is_not_ours_to_take() -> None:
    model = tiny_model("llama")
    before = state(model)
    apply_kernel(NORM, model=model)
    norm = model.model.norm
    norm.forward = lambda hidden_states: hidden_states
    unpatch(model)
    assert "forward" in vars(norm)
    del norm.forward
    assert same(state(model), before)
