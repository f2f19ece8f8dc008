"""Modelling modules that are imported after patching."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import Architecture, KernelPatchError, KernelPatchWarning
from hf_kernel_patch.models import architectures
from tests.support.probes import LAYERS, MOE, NORM, ROPE, SWIGLU, logits, run_python, served
from tests.support.tiny import modelling, tiny_config

NAME = "smollm3"
PLACES = ("SmolLM3RMSNorm.forward", "apply_rotary_pos_emb", "SmolLM3MLP.forward")


pytestmark = pytest.mark.usefixtures("not_imported")


def is_ours(module: Any, place: str) -> bool:
    """Whether a replacement stands at the place."""
    owner, _, attribute = place.rpartition(".")
    value = getattr(getattr(module, owner), attribute) if owner else getattr(module, place)
    return hasattr(value, "__hf_kernel_patch__")


def test_pending_rows_turn_patched_when_the_module_is_imported() -> None:
    report = hf_kernel_patch.patch_transformers(LAYERS, models=NAME, strict=True)
    assert [row.outcome for row in report] == ["pending"] * 3
    assert f"{NAME}, when it is imported" in str(report)
    module = modelling(NAME)
    assert [row.outcome for row in report] == ["patched"] * 3
    assert all(is_ours(module, place) for place in PLACES)
    model = module.SmolLM3ForCausalLM(tiny_config(NAME))
    hf_kernel_patch.count_calls()
    inside = logits(model)
    calls = served(report)
    assert calls >= 9
    hf_kernel_patch.unpatch()
    assert not any(is_ours(module, place) for place in PLACES)
    assert torch.equal(logits(model), inside)
    assert served(report) == calls


def test_other_modules_stay_pending() -> None:
    report = hf_kernel_patch.patch_transformers(NORM, models=(NAME, "llama", "olmo2"))
    outcomes = {row.architecture: row.outcome for row in report}
    assert outcomes[NAME] == "pending"
    modelling("llama")
    assert {row.architecture: row.outcome for row in report}[NAME] == "pending"
    modelling(NAME)
    assert {row.architecture: row.outcome for row in report}[NAME] == "patched"
    hf_kernel_patch.unpatch()


def test_nothing_happens_after_unpatch() -> None:
    report = hf_kernel_patch.patch_transformers(LAYERS, models=NAME)
    hf_kernel_patch.unpatch()
    module = modelling(NAME)
    assert not any(is_ours(module, place) for place in PLACES)
    assert not report.patched
    assert not hf_kernel_patch.status().rows


def test_nothing_happens_after_the_block() -> None:
    with hf_kernel_patch.patched(LAYERS, models=NAME):
        pass
    module = modelling(NAME)
    assert not any(is_ours(module, place) for place in PLACES)


def test_a_module_imported_inside_a_block_is_given_back_at_its_end() -> None:
    with hf_kernel_patch.patched(LAYERS, models=NAME) as report:
        module = modelling(NAME)
        assert all(is_ours(module, place) for place in PLACES)
        originals = [row.outcome for row in report]
    assert originals == ["patched"] * 3
    assert not any(is_ours(module, place) for place in PLACES)


def test_every_patch_in_force_takes_its_part() -> None:
    hf_kernel_patch.patch_transformers(NORM, models=NAME)
    with hf_kernel_patch.patched((NORM, ROPE), models=NAME):
        module = modelling(NAME)
        assert [is_ours(module, place) for place in PLACES] == [True, True, False]
    assert [is_ours(module, place) for place in PLACES] == [True, False, False]
    hf_kernel_patch.unpatch()
    assert not any(is_ours(module, place) for place in PLACES)


def test_patching_again_before_the_import_patches_once() -> None:
    for include in (NORM, ROPE, NORM):
        hf_kernel_patch.patch_transformers(include, models=NAME)
    module = modelling(NAME)
    assert [is_ours(module, place) for place in PLACES] == [True, False, False]
    hf_kernel_patch.unpatch()
    assert not any(is_ours(module, place) for place in PLACES)


def test_a_module_that_is_imported_twice_is_patched_twice() -> None:
    """Some programs drop modules from ``sys.modules`` and import them anew."""
    first = modelling(NAME)
    hf_kernel_patch.patch_transformers(NORM, models=NAME)
    assert is_ours(first, PLACES[0])
    hf_kernel_patch.unpatch()
    del sys.modules[first.__name__]
    hf_kernel_patch.patch_transformers(NORM, models=NAME)
    second = modelling(NAME)
    assert second is not first
    assert (is_ours(first, PLACES[0]), is_ours(second, PLACES[0])) == (False, True)
    hf_kernel_patch.unpatch()


def test_the_environment_disables_later_imports_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH_DISABLE", "1")
    hf_kernel_patch.patch_transformers(LAYERS, models=NAME)
    assert not is_ours(modelling(NAME), PLACES[0])


@pytest.fixture
def wrong_table() -> Iterator[str]:
    """A table that is right about the norm and wrong about the MLP."""
    rows = {"SmolLM3RMSNorm.forward": "rms_norm.llama"} | {
        "SmolLM3Attention.forward": "gated_product",
    }
    module = architectures()[NAME].module
    hf_kernel_patch.register_model(Architecture("wrong", rows, module=module))
    yield "wrong"
    del architectures()["wrong"]


def test_a_target_that_does_not_match_is_skipped_when_it_is_imported(wrong_table: str) -> None:
    report = hf_kernel_patch.patch_transformers((NORM, SWIGLU), models=wrong_table)
    with pytest.warns(KernelPatchWarning, match=r"SmolLM3Attention\.forward is not patched"):
        module = modelling(NAME)
    assert [row.outcome for row in report] == ["patched", "skipped"]
    assert "no code that the rule" in report.rows[1].reason
    assert (is_ours(module, PLACES[0]), is_ours(module, PLACES[2])) == (True, False)
    hf_kernel_patch.unpatch()


def test_a_target_that_does_not_match_raises_at_the_import_when_strict(wrong_table: str) -> None:
    report = hf_kernel_patch.patch_transformers((NORM, SWIGLU), models=wrong_table, strict=True)
    for _ in range(2):  # importing again is no way around it
        with pytest.raises(KernelPatchError, match=r"SmolLM3Attention\.forward is not patched"):
            modelling(NAME)
        assert architectures()[NAME].module not in sys.modules
        assert not report.patched
        assert not hf_kernel_patch.status().patched
    hf_kernel_patch.unpatch()
    module = modelling(NAME)
    assert not any(is_ours(module, place) for place in PLACES)


def test_an_import_that_one_patch_refuses_is_patched_by_none(wrong_table: str) -> None:
    with hf_kernel_patch.patched(ROPE, models=NAME) as before:
        hf_kernel_patch.patch_transformers((NORM, SWIGLU), models=wrong_table, strict=True)
        with hf_kernel_patch.patched(NORM, models=NAME) as after:
            with pytest.raises(KernelPatchError, match=r"SmolLM3Attention\.forward is not patched"):
                modelling(NAME)
            assert [row.outcome for row in (*before, *after)] == ["pending"] * 2
        hf_kernel_patch.patch_transformers(None)
        module = modelling(NAME)
        assert [row.outcome for row in before] == ["patched"]
        assert [is_ours(module, place) for place in PLACES] == [False, True, False]
    assert not any(is_ours(module, place) for place in PLACES)


def test_a_kernel_without_a_site_raises_at_once_not_at_the_import() -> None:
    with pytest.raises(KernelPatchError, match=f"{MOE} found no site in {NAME}"):
        hf_kernel_patch.patch_transformers(MOE, models=NAME, strict=True)
    assert not is_ours(importlib.import_module(architectures()[NAME].module), PLACES[0])


#: A patch comes first, then the import of transformers, then a class of one's own.
FIRST_OF_ALL = """
import hf_kernel_patch
report = hf_kernel_patch.patch_transformers("torch_fused_swiglu")
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

class OwnMLP(nn.Module):
    def forward(self, gate, up):
        return nn.functional.silu(gate) * up

class OwnModel(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.mlp = OwnMLP()

OwnModel(PretrainedConfig())
assert [row.site for row in report.patched] == ["own_model.OwnMLP.forward"], report
hf_kernel_patch.unpatch()
assert not hasattr(OwnMLP.forward, "__hf_kernel_patch__")
assert PreTrainedModel.__init__.__module__ == "transformers.modeling_utils"
assert not hasattr(PreTrainedModel.__init__, "__wrapped__")
"""


def test_a_class_of_one_s_own_where_the_patch_comes_before_transformers(tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text(FIRST_OF_ALL)
    done = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import own_model")
    assert done.returncode == 0, done.stderr


class LoadedAtFirstUse(ModuleType):
    """As packages have whose parts are slow to import, or cannot be."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__spec__":
            raise RuntimeError("this would load it")
        return super().__getattribute__(name)


def test_modules_that_do_not_matter_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "slow_to_load", LoadedAtFirstUse("slow_to_load"))
    with hf_kernel_patch.patched(NORM, models=NAME) as report:
        modelling(NAME)
        assert [row.outcome for row in report] == ["patched"]
