"""``exclude`` by the names of sites: they stay the original's, and the report says why."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import KernelPatchError, KernelPatchWarning, apply_default_kernels, patched
from tests.support.probes import LAYERS, NORM, ROPE, SWIGLU, changed, llama, places, run_python
from tests.support.tiny import error, outputs_and_gradients, tiny_model

LLAMA = "transformers.models.llama.modeling_llama"
MLP, ATTENTION = f"{LLAMA}.LlamaMLP.forward", f"{LLAMA}.LlamaAttention.forward"
ALL = ",".join((*LAYERS, "torch_fused_linear_cross_entropy", "torch_fused_add_rmsnorm"))


@pytest.fixture
def before() -> dict[str, Any]:
    llama()
    return places()


def excluded(report: Any) -> dict[str, str]:
    """Last part of a site -> the reason, of the rows that say that they are excluded."""
    return {
        row.site.partition(".modeling_")[2].partition(".")[2]: row.reason
        for row in report
        if row.outcome == "skipped" and row.reason.startswith("excluded by")
    }


@pytest.mark.parametrize(
    "pattern",
    [
        MLP,
        "*.LlamaMLP.forward",
        "llama.modeling_llama.LlamaMLP.forward",
        "*LlamaM?P*",
        "*.Llama[M]LP.forward",
    ],
)
def test_a_site_is_left_out_by_its_name_or_a_pattern(pattern: str, before: dict[str, Any]) -> None:
    with patched(",".join(LAYERS), models="llama", exclude=pattern, strict=True) as report:
        assert changed(before) == {"LlamaRMSNorm.forward", "apply_rotary_pos_emb"}
        assert excluded(report) == {"LlamaMLP.forward": f"excluded by {pattern!r}"}
        assert excluded(hf_kernel_patch.status()) == excluded(report)
    assert not changed(before)


def test_case_matters(before: dict[str, Any]) -> None:
    with (
        pytest.warns(KernelPatchWarning, match=r"no site matches '\*.llamamlp.forward' in exclude"),
        patched(SWIGLU, models="llama", exclude="*.llamamlp.forward"),
    ):
        assert changed(before) == {"LlamaMLP.forward"}


def test_a_function_with_several_ops_stays_the_original_s_as_a_whole(
    before: dict[str, Any],
) -> None:
    pattern = "*.LlamaForCausalLM.forward"
    kernels = f"{ALL},decode_attention"
    with patched(kernels, models="llama", exclude=(pattern, "*.LlamaDecoderLayer.*")) as report:
        assert "LlamaForCausalLM.forward" not in changed(before)
        assert "LlamaDecoderLayer.forward" not in changed(before)
        assert "LlamaMLP.forward" in changed(before)
    ops = {row.op for row in report if row.site.endswith("LlamaForCausalLM.forward")}
    assert ops == {"linear_cross_entropy", "decode_attention"}
    assert all(row.outcome == "skipped" for row in report if row.op in ops)


def test_ids_ops_and_sites_together(before: dict[str, Any]) -> None:
    with patched(ALL, models="llama", exclude=f"rope,*.LlamaMLP.forward,{NORM}") as report:
        assert {row.op for row in report.patched} == {"linear_cross_entropy", "add_rms_norm"}


def test_the_variable_and_the_config_hold_for_every_way_to_patch(
    before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH_EXCLUDE", "*.LlamaMLP.forward")
    why = {
        "LlamaMLP.forward": "excluded by '*.LlamaMLP.forward' in the variable "
        "HF_KERNEL_PATCH_EXCLUDE"
    }
    assert excluded(hf_kernel_patch.patch_transformers(",".join(LAYERS), models="llama")) == why
    hf_kernel_patch.unpatch()
    model = tiny_model("llama")
    apply_default_kernels(model, ",".join(LAYERS))
    assert excluded(hf_kernel_patch.status()) == why
    hf_kernel_patch.unpatch()
    hf_kernel_patch.apply_kernel(SWIGLU, model=model)
    assert not hf_kernel_patch.status().patched
    with patched(SWIGLU, models="llama", exclude=None):  # an argument goes before
        assert changed(before) == {"LlamaMLP.forward"}
    monkeypatch.delenv("HF_KERNEL_PATCH_EXCLUDE")
    config = {"include_kernels": SWIGLU, "exclude": ["*.LlamaMLP.forward"]}
    with patched(config=config, models="llama") as report:
        assert set(excluded(report)) == {"LlamaMLP.forward"}


def test_the_variable_may_name_sites_of_models_that_this_patch_leaves_out(
    before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH_EXCLUDE", "*.Qwen3MLP.forward")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patched(SWIGLU, models="llama", strict=True) as report:
            assert report.patched
        hf_kernel_patch.unpatch(apply_default_kernels(tiny_model("llama"), SWIGLU))
    monkeypatch.setenv("HF_KERNEL_PATCH_EXCLUDE", "*.Qwen3MPL.forward")
    with pytest.raises(KernelPatchError, match=r"did you mean .*Qwen3MLP"):
        patched(SWIGLU, models="llama", strict=True).__enter__()


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.LlamaMPL.forward", r"\*\.LlamaMLP\.forward"),
        ("LlamaMLP.forward", r"\*\.LlamaMLP\.forward"),
        ("*.apply_rotary_posemb", r"\*\.apply_rotary_pos_emb"),
        (MLP.replace("MLP", "MPL"), r"\*\.LlamaMLP\.forward"),
        ("*.Qwen2MLP.forward", r"\*\.LlamaMLP\.forward"),  # not among the models that are chosen
    ],
)
def test_a_pattern_that_matches_nothing_is_told(
    pattern: str, near: str, before: dict[str, Any]
) -> None:
    message = rf"no site matches .* in exclude; did you mean .*{near}"
    with (
        pytest.warns(KernelPatchWarning, match=message),
        patched(",".join(LAYERS), models="llama", exclude=pattern),
    ):
        assert "LlamaMLP.forward" in changed(before)
    with pytest.raises(KernelPatchError, match=message):
        patched(NORM, models="llama", exclude=pattern, strict=True).__enter__()
    assert not changed(before)
    model = tiny_model("llama")
    with pytest.warns(KernelPatchWarning, match=message):
        apply_default_kernels(model, NORM, exclude=pattern)
    hf_kernel_patch.unpatch(model)


@pytest.mark.parametrize("name", ["LlamaMLP", "ropee", "torch_fused_rmsnrm"])
def test_a_name_that_is_no_pattern_has_to_be_a_kernel_or_an_op(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}'.* Sites are written as '\*\.Llama"):
        patched("rope", exclude=name)


def test_a_pattern_for_a_family_that_is_not_imported_is_no_mistake() -> None:
    done = run_python(
        "import sys, warnings\n"
        "warnings.simplefilter('error')\n"
        "import hf_kernel_patch as h\n"
        "r = h.patch_transformers('torch_fused_swiglu,torch_fused_rmsnorm', strict=True,\n"
        "    exclude='*.Gemma3MLP.forward,*.LlamaMLP.forward,transformers_modules.*')\n"
        "assert 'transformers.models.gemma3.modeling_gemma3' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
        "from transformers.models.gemma3 import modeling_gemma3\n"
        "from transformers.models.llama import modeling_llama\n"
        "print(*(row.site.split('.modeling_')[1] + ' ' + row.outcome\n"
        "    for row in r if 'emma3' in row.site or 'Llama' in row.site))\n"
        "assert not hasattr(modeling_gemma3.Gemma3MLP.forward, '__hf_kernel_patch__')\n"
        "assert not hasattr(modeling_llama.LlamaMLP.forward, '__hf_kernel_patch__')\n"
        "assert hasattr(modeling_llama.LlamaRMSNorm.forward, '__hf_kernel_patch__')\n"
    )
    assert done.returncode == 0, done.stderr
    assert "gemma3.Gemma3MLP.forward skipped" in done.stdout
    assert "llama.LlamaMLP.forward skipped" in done.stdout


OWN = f"""
from {LLAMA} import *
from {LLAMA} import LlamaForCausalLM, LlamaMLP, nn, ACT2FN

class OwnMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OwnMLP(config)
"""


@pytest.mark.parametrize("left_out", [False, True])
def test_it_holds_for_code_that_comes_later(
    left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_model_{left_out}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    exclude = f"{name}.OwnMLP.forward" if left_out else None
    report = hf_kernel_patch.patch_transformers(SWIGLU, exclude=exclude, strict=True)
    __import__(name)
    module = sys.modules[name]
    module.OwnForCausalLM(tiny_model("llama").config)
    (row,) = [row for row in report if row.site == f"{name}.OwnMLP.forward"]
    assert row.outcome == ("skipped" if left_out else "patched")
    assert hasattr(module.OwnMLP.forward, "__hf_kernel_patch__") is not left_out
    hf_kernel_patch.status()
    assert row.outcome == ("skipped" if left_out else "patched")
    hf_kernel_patch.unpatch()
    with pytest.warns(KernelPatchWarning, match=rf"no site matches '{name}.OwnMPL.forward'"):
        patched(SWIGLU, exclude=f"{name}.OwnMPL.forward").__enter__()
    hf_kernel_patch.unpatch()


def test_one_patch_may_exclude_what_another_serves(before: dict[str, Any]) -> None:
    sites = {"LlamaMLP.forward", "LlamaRMSNorm.forward"}
    with patched(f"{SWIGLU},{NORM}", models="llama"):
        with patched(f"{SWIGLU},{NORM}", models="llama", exclude="*.LlamaMLP.*") as inner:
            assert changed(before) == sites
            assert set(excluded(inner)) == {"LlamaMLP.forward"}
        assert changed(before) == sites
    outer = patched(f"{SWIGLU},{NORM}", models="llama", exclude="*.LlamaMLP.*")
    with outer:
        with patched(SWIGLU, models="llama"):
            assert changed(before) == sites
        assert changed(before) == sites - {"LlamaMLP.forward"}
    hf_kernel_patch.patch_transformers(SWIGLU, models="llama")
    hf_kernel_patch.patch_transformers(SWIGLU, models="llama", exclude=MLP)  # takes its place
    assert not changed(before)
    hf_kernel_patch.patch_transformers(SWIGLU, models="llama")
    assert changed(before) == {"LlamaMLP.forward"}
    hf_kernel_patch.unpatch()


def test_one_model_and_its_neighbour(before: dict[str, Any]) -> None:
    one, other = tiny_model("llama"), tiny_model("llama")
    apply_default_kernels(one, ALL, exclude="*.LlamaMLP.forward,*.LlamaDecoderLayer.forward")
    apply_default_kernels(other, ALL)
    layers = [model.model.layers[0] for model in (one, other)]
    original = llama().LlamaMLP.forward
    assert [type(layer.mlp).forward is original for layer in layers] == [True, False]
    original = llama().LlamaDecoderLayer.forward
    assert [type(layer).forward is original for layer in layers] == [True, False]
    report = hf_kernel_patch.status()
    assert set(excluded(report)) == {"LlamaMLP.forward", "LlamaDecoderLayer.forward"}
    assert not changed(before)
    hf_kernel_patch.unpatch(other)
    hf_kernel_patch.unpatch(one)


@pytest.mark.parametrize("pattern", ["*.LlamaAttention.forward", "*.apply_rotary_pos_emb"])
def test_in_one_model_the_caller_of_a_function_may_be_named(pattern: str) -> None:
    model = tiny_model("llama")
    apply_default_kernels(model, f"{ROPE},{NORM}", exclude=pattern)
    layer = model.model.layers[0]
    assert type(layer.self_attn) is llama().LlamaAttention
    assert type(layer.input_layernorm) is not llama().LlamaRMSNorm
    assert set(excluded(hf_kernel_patch.status())) == {pattern.removeprefix("*.")}
    hf_kernel_patch.unpatch(model)


def test_all_excluded_computes_what_the_original_does() -> None:
    truth = outputs_and_gradients(tiny_model("qwen3"))
    with patched(ALL, models="qwen3", exclude="transformers.*", strict=True) as report:
        assert not report.patched
        found = outputs_and_gradients(tiny_model("qwen3"))
    assert max(error(found[key], truth[key]) for key in truth) == 0
    assert torch.equal(found["loss"], truth["loss"])


def test_a_kernel_with_an_apply_of_its_own_says_that_it_does_not_look() -> None:
    from hf_kernel_patch import registry
    from hf_kernel_patch.kernels import BaseKernel, register_kernel

    class Whole(BaseKernel):
        kernel_id = "whole"

        @classmethod
        def apply(cls, *, model: Any) -> Any:
            model.seen = True
            return model

    register_kernel(Whole)
    try:
        model = tiny_model("llama")
        with pytest.warns(KernelPatchWarning, match="whole patches the model in its own way"):
            apply_default_kernels(model, "whole", exclude="*.LlamaMLP.forward")
        hf_kernel_patch.unpatch(model)
    finally:
        del registry.kernels()["whole"]
