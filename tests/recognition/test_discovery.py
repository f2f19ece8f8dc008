"""Code that no table names: of transformers, of remote code and of users, found when it comes."""

from __future__ import annotations

import importlib
import json
import linecache
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import hf_kernel_patch
from hf_kernel_patch import KernelPatchWarning, models
from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching.lookup import exists_here
from hf_kernel_patch.recognition import known
from hf_kernel_patch.recognition.discovery import discover
from hf_kernel_patch.recognition.static import scope_of
from hf_kernel_patch.version import NEWEST_TRANSFORMERS
from tests.support.probes import LAYERS, llama, served
from tests.support.tiny import ARCHITECTURES, modelling, tiny_config, tokens

LOSS = "torch_fused_linear_cross_entropy"
EVERY = ",".join((*LAYERS, "torch_fused_add_rmsnorm", LOSS))
#: A family without a table, and what is found in its forwards.
FAMILY = "cwm" if int(transformers.__version__.partition(".")[0]) >= 5 else "arcee"
OPS = {"rms_norm", "rope", "add_rms_norm", "linear_cross_entropy"}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def family_model() -> Any:
    """A tiny model of the family, always with the same weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(FAMILY, **SMALL)).train()


def loss_and_gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def is_ours(value: Any) -> bool:
    return hasattr(value, "__hf_kernel_patch__")


def ops_served(report: Any, architecture: str = "") -> set[str]:
    return {row.op for row in report if row.served and architecture in row.architecture}


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes a user's file with Llama's code, and imports it."""
    source = (
        Path(llama().__file__).read_text(encoding="utf-8").replace("from ...", "from transformers.")
    )
    source = source.replace("from .configuration", "from transformers.models.llama.configuration")
    (tmp_path / "own_layers.py").write_text(source, encoding="utf-8")
    program = (
        "from own_layers import LlamaForCausalLM\nclass OwnModel(LlamaForCausalLM):\n    pass\n"
    )
    (tmp_path / "own_model.py").write_text(program, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: importlib.import_module("own_model")
    hf_kernel_patch.unpatch()
    for name in ("own_model", "own_layers"):
        sys.modules.pop(name, None)


def test_a_family_without_a_table_is_served_and_given_back() -> None:
    model = family_model()
    eager = loss_and_gradients(model)
    hf_kernel_patch.count_calls()
    report = hf_kernel_patch.patch_transformers(EVERY, strict=True)
    patched = loss_and_gradients(model)
    assert ops_served(report, FAMILY) >= OPS
    for found, expected in zip(patched, eager):
        torch.testing.assert_close(found, expected)
    before = served(report)
    hf_kernel_patch.unpatch()
    assert all(map(torch.equal, loss_and_gradients(model), eager))
    assert served(report) == before
    module = sys.modules[type(model).__module__]
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
    assert not any(is_ours(value) for kind in (module, *kinds) for value in vars(kind).values())


def test_a_family_that_is_imported_later_is_patched_then() -> None:
    module = sys.modules.pop(models.find_modules(FAMILY)[0], None)
    report = hf_kernel_patch.patch_transformers(EVERY)
    assert not [row for row in report if row.architecture == FAMILY]
    later = importlib.import_module(models.find_modules(FAMILY)[0])
    rows = [row for row in report if row.architecture == FAMILY]
    assert {row.op for row in rows if row.outcome == "patched"} >= OPS
    hf_kernel_patch.unpatch()
    if module is not None:
        sys.modules[later.__name__] = module


def test_only_the_families_that_are_named_are_looked_at() -> None:
    family_model()
    with hf_kernel_patch.patched(EVERY, models="llama") as report:
        assert {row.architecture for row in report} == {"llama"}
    with hf_kernel_patch.patched(EVERY, models=FAMILY) as report:
        assert {row.architecture for row in report} == {FAMILY}
    with pytest.raises(
        ValueError, match=f"unknown model '{FAMILY}x'.*did you mean '{FAMILY}'"
    ) as told:
        hf_kernel_patch.patch_transformers(models=f"{FAMILY}x")
    assert len(str(told.value)) < 400


def test_one_model_without_a_table() -> None:
    model, other = family_model(), family_model()
    eager = loss_and_gradients(model)
    hf_kernel_patch.count_calls()
    hf_kernel_patch.apply_default_kernels(model, EVERY.replace(",torch_fused_swiglu", ""))
    found = loss_and_gradients(model)
    assert ops_served(hf_kernel_patch.status(), FAMILY) >= OPS
    torch.testing.assert_close(found, eager)
    calls = served(hf_kernel_patch.status())
    assert all(map(torch.equal, loss_and_gradients(other), eager))
    assert served(hf_kernel_patch.status()) == calls
    hf_kernel_patch.unpatch(model)
    assert all(map(torch.equal, loss_and_gradients(model), eager))


@pytest.mark.parametrize("first", ["patched", "imported", "built"])
def test_a_user_s_own_model_in_files(own_module: Any, first: str) -> None:
    config = tiny_config("llama")
    if first == "patched":
        report = hf_kernel_patch.patch_transformers(EVERY)
    model: Any = own_module().OwnModel(config) if first == "built" else None
    own_module()
    if first != "patched":
        report = hf_kernel_patch.patch_transformers(EVERY)
    model = model or own_module().OwnModel(config)
    hf_kernel_patch.count_calls()
    loss_and_gradients(model.train())
    assert ops_served(report, "own_layers") >= OPS | {"swiglu"}
    kinds = sys.modules["own_layers"].LlamaMLP, sys.modules["own_layers"].LlamaRMSNorm
    assert all(is_ours(kind.forward) for kind in kinds)
    hf_kernel_patch.unpatch()
    assert not any(is_ours(kind.forward) for kind in kinds)


def test_what_watches_models_being_built_is_taken_back() -> None:
    base: Any = transformers.PreTrainedModel
    before, finders = base.__init__, list(sys.meta_path)
    with hf_kernel_patch.patched(EVERY):
        assert base.__init__ is not before
        assert base.__init__.__wrapped__ is before
    assert base.__init__ is before and sys.meta_path == finders
    hf_kernel_patch.patch_transformers(None)
    assert base.__init__ is before and sys.meta_path == finders


PROGRAM = """
import torch
from transformers import LlamaConfig, LlamaPreTrainedModel
from torch import nn
import hf_kernel_patch

class OwnRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

class OtherRMSNorm(OwnRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 1

class Own(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.norm, self.other = OwnRMSNorm(8), OtherRMSNorm(8)

    def forward(self, x):
        return self.other(self.norm(x))

hf_kernel_patch.count_calls()
report = hf_kernel_patch.patch_transformers("rms_norm", backend="torch")
Own(LlamaConfig())(torch.randn(2, 8))
for row in report:
    if row.architecture == "__main__":
        print(row.site, row.outcome, row.served, row.reason)
"""


def test_a_program_s_own_classes_and_what_only_looks_like_a_norm(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    root = str(Path(hf_kernel_patch.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines == [
        "__main__.OtherRMSNorm.forward skipped 0 no known code; "
        "the nearest is the leaf " + lines[0].rpartition(" ")[2],
        "__main__.OwnRMSNorm.forward patched 2 ",
    ]
    assert lines[0].rpartition(" ")[2] in known()
    assert "KernelPatchWarning" not in done.stderr


def test_code_without_source_is_a_line_of_the_report() -> None:
    module = types.ModuleType("no_source")
    sys.modules["no_source"] = module
    exec(PROGRAM.partition("hf_kernel_patch.count")[0], vars(module))
    report = hf_kernel_patch.patch_transformers("rms_norm", backend="torch")
    module.Own(transformers.LlamaConfig())
    rows = {row.site: row for row in report if row.architecture == "no_source"}
    del sys.modules["no_source"]
    hf_kernel_patch.unpatch()
    assert "cannot be read" in rows["no_source.OwnRMSNorm.forward"].reason


@pytest.mark.parametrize(
    ("model", "site", "rule"),
    [
        ("starcoder2", "Starcoder2MLP.forward", "gated_product"),
        ("phi", "PhiDecoderLayer.forward", "residual_norm"),
        ("bart", "BartForConditionalGeneration.forward", "head_loss"),
    ],
)
def test_what_is_called_as_a_rule_s_code_and_is_none_is_a_line(
    model: str, site: str, rule: str
) -> None:
    modelling_module = importlib.import_module(models.find_modules(model)[0])
    found = discover(vars(modelling_module), modelling_module.__name__)
    assert {one.reason for one in found if one.qualname == site and one.code == rule} == {
        f"no code that the rule {rule} knows"
    }
    with hf_kernel_patch.patched(EVERY, models=model) as report:
        rows = [row for row in report if row.site.endswith(f".{site}")]
    assert [row.outcome for row in rows if "no code that" in row.reason] == ["skipped"]


def test_heads_without_a_loss_of_their_own_are_no_lines() -> None:
    """A model that hands its labels on, or has none, has no loss that could be fused."""
    program = "class OwnForCausalLM(torch.nn.Module):\n    def forward(self, x, labels=None):\n"
    for body, expected in [("self.model(x, labels)", 0), ("self.loss_function(x, labels)", 1)]:
        scope = {"torch": torch, "__name__": "own_heads"}
        text = f"{program}        return {body}\n"
        linecache.cache["<own heads>"] = (len(text), None, text.splitlines(True), "<own heads>")
        exec(compile(text, "<own heads>", "exec"), scope)
        assert len(discover(scope, "own_heads")) == expected


def test_a_notebook_whose_cell_is_run_again_is_patched_again() -> None:
    notebook = types.ModuleType("notebook")
    sys.modules["notebook"] = notebook
    source = PROGRAM.partition("hf_kernel_patch.count")[0]
    report = hf_kernel_patch.patch_transformers("rms_norm", backend="torch")
    hf_kernel_patch.count_calls()
    kinds = []
    for number in (1, 2):
        cell = f"<cell {number}>"
        linecache.cache[cell] = len(source), None, source.splitlines(keepends=True), cell
        exec(compile(source, cell, "exec"), vars(notebook))
        notebook.Own(transformers.LlamaConfig())(torch.randn(2, 8))
        kinds.append(notebook.OwnRMSNorm)
        (row,) = [one for one in report if one.site == "notebook.OwnRMSNorm.forward"]
        assert (row.outcome, row.served) == ("patched", 2 * number)
    assert all(is_ours(kind.forward) for kind in kinds)
    hf_kernel_patch.unpatch()
    del sys.modules["notebook"]
    assert not any(is_ours(kind.forward) for kind in kinds)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with code of its own, as AutoModel loads it with ``trust_remote_code``."""
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache")
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "folder"
    folder.mkdir()
    source = Path(modelling("smollm3").__file__).read_text(encoding="utf-8")
    source = source.replace("from ...", "from transformers.").replace(
        "from .configuration_smollm3 import SmolLM3Config",
        "from transformers import SmolLM3Config",
    )
    (folder / "modeling_own.py").write_text(source, encoding="utf-8")
    config = tiny_config("smollm3").to_dict()
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.SmolLM3ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_remote_code_is_patched(remote: Path) -> None:
    hf_kernel_patch.count_calls()
    report = hf_kernel_patch.patch_transformers(EVERY)
    config = AutoConfig.from_pretrained(remote)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).train()
    assert type(model).__module__.startswith("transformers_modules.")
    patched = loss_and_gradients(model)
    assert ops_served(report, "transformers_modules.") >= OPS | {"swiglu"}
    hf_kernel_patch.unpatch()
    torch.testing.assert_close(loss_and_gradients(model), patched)
    assert not is_ours(type(model).forward)


def test_near_misses_and_missing_sources_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    importlib.import_module("transformers.models.t5.modeling_t5")
    with hf_kernel_patch.patched(EVERY, strict=True) as report:
        reasons = [row.reason for row in report.skipped if row.architecture == "t5"]
    assert all(reasons)
    assert not [one for one in recwarn if one.category is KernelPatchWarning]


#: In a branch, they keep decoding from being captured.
NOT_LISTED = {("glm4_moe", "Glm4MoeAttention.forward")}


@pytest.mark.skipif(
    transformers.__version__ != NEWEST_TRANSFORMERS, reason="tables are made for the newest"
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tables_name_all_that_is_found(name: str) -> None:
    """A table is what is expected: what its module has besides would never be patched."""
    table = architectures()[name]
    module = modelling(name)
    found = {(f.qualname, f.code) for f in discover(vars(module), table.module) if not f.reason}
    # A row is for one leaf or rule, though another version may have other code there.
    elsewhere = {spec.qualname for spec in table.sites if not exists_here(spec)}
    expected = {(spec.qualname, spec.code) for spec in table.sites}
    found = {one for one in found if one[0] not in elsewhere and (name, one[0]) not in NOT_LISTED}
    assert found <= expected


def test_source_alone_gives_what_the_module_gives() -> None:
    for name in ("llama", "gemma2", "qwen3_moe"):
        module = modelling(name)
        live = {f[:2] for f in discover(vars(module), module.__name__) if not f.reason}
        scope = scope_of(Path(module.__file__), module.__name__)
        static = {f[:2] for f in discover(scope, module.__name__) if not f.reason}
        inherited = {one for one in live if known()[one[1]].name == "moe.decoding"}
        assert static == live - inherited
