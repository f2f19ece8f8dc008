"""``hf_kernel_patch.AutoModelForCausalLM``: models that come patched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_kernel_patch
from hf_kernel_patch import AutoModelForCausalLM
from tests.support.pages import blocks
from tests.support.probes import logits
from tests.support.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return folder


def kernels() -> set[str]:
    return {row.op for row in hf_kernel_patch.status().patched}


def test_the_model_is_patched_and_no_other(saved: Path) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, kernels="swiglu")
    assert kernels() == {"swiglu"}
    assert all(row.scope == "model" for row in hf_kernel_patch.status())
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, type(other))
    assert type(other.model.layers[0].mlp) is not type(model.model.layers[0].mlp)
    torch.testing.assert_close(logits(model), logits(other))
    hf_kernel_patch.unpatch(model)
    assert type(other.model.layers[0].mlp) is type(model.model.layers[0].mlp)


def test_the_defaults_of_the_device_are_applied(saved: Path) -> None:
    names = set(hf_kernel_patch.get_default_kernels())
    model = AutoModelForCausalLM.from_pretrained(saved)
    found = {row.kernel for row in hf_kernel_patch.status().patched}
    assert found and found <= names
    hf_kernel_patch.unpatch(model)
    for nothing in (None, False):
        AutoModelForCausalLM.from_pretrained(saved, kernels=nothing)
        assert not hf_kernel_patch.status().rows


def test_exclude_options_config_and_loading_info(saved: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        saved,
        kernels="rms_norm,linear_cross_entropy",
        kernel_exclude="*.LlamaRMSNorm.forward",
        kernel_options={"linear_cross_entropy": {"metrics": True}},
        output_loading_info=True,
    )
    assert kernels() == {"linear_cross_entropy"} and not info["missing_keys"]
    ids = torch.arange(8).view(1, 8)
    assert model.train()(ids, labels=ids).mean_entropy > 0
    hf_kernel_patch.unpatch(model)
    model = AutoModelForCausalLM.from_pretrained(saved, kernel_config={"include_kernels": "rope"})
    assert kernels() == {"rope"}
    hf_kernel_patch.unpatch(model)


def test_models_of_a_config_and_the_rest_of_the_class() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), kernels="rms_norm")
    assert kernels() == {"rms_norm"}
    hf_kernel_patch.unpatch(model)
    assert issubclass(AutoModelForCausalLM, transformers.AutoModelForCausalLM)
    assert AutoModelForCausalLM is hf_kernel_patch.AutoModelForCausalLM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernels": "rms_nrm"}, "did you mean 'rms_norm'"),
        ({"kernel_exclude": "ropee"}, "did you mean 'rope'"),
        ({"kernels": "rope", "kernel_options": "rope.size=3"}, "unknown option 'size'"),
    ],
)
def test_a_wrong_name_raises_before_anything_is_loaded(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained("/there/is/no/such/model", **arguments)


def test_the_examples_of_the_page_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    (saved.parent / "my-model").symlink_to(saved)
    names: dict[str, Any] = {}
    for example in blocks("trainer.md", "python"):
        exec(example, names)
    assert names["callback"].report.note == "no model was patched"
    assert kernels()
    hf_kernel_patch.unpatch(names["model"])
