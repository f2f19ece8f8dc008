"""Where the code of a model comes from: a zip file, a notebook, a prompt, nowhere."""

from __future__ import annotations

import importlib
import linecache
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import Architecture, KernelPatchWarning
from hf_kernel_patch.models import architectures
from tests.support.probes import run_python
from tests.support.tiny import layer_ops_of

pytestmark = pytest.mark.filterwarnings("ignore::hf_kernel_patch.KernelPatchWarning")
OPS = layer_ops_of("llama")


SOURCE = """
import torch
from torch import nn


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class OwnMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act_fn = OwnNorm(), nn.SiLU()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x)
        return self.down(self.act_fn(x) * self.up(x))
"""
ROWS = {"OwnNorm.forward": "rms_norm.llama", "OwnMLP.forward": "gated_product"}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Registers a table for a module of that name."""

    def table(name: str) -> None:
        monkeypatch.setitem(architectures(), name, Architecture(name, ROWS, module=name))

    return table


def typed(name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module whose code somebody has typed."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(SOURCE, file, "exec"), vars(module))
    return module


def is_served(module: Any, name: str) -> None:
    """By a leaf and by a rule, with the original's result, and given back."""
    before = module.OwnNorm.forward, module.OwnMLP.forward
    mlp, x = module.OwnMLP(), torch.randn(3, 8)
    eager = mlp(x)
    hf_kernel_patch.count_calls()
    with hf_kernel_patch.patched("rms_norm,swiglu", models=name, strict=True) as report:
        torch.testing.assert_close(mlp(x), eager)
        assert [row.served for row in report] == [1, 1]
        assert module.OwnNorm.forward is not before[0]
    assert (module.OwnNorm.forward, module.OwnMLP.forward) == before


def test_a_modelling_module_in_a_zip_file(
    tmp_path: Path, own: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "packed.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("modeling_packed.py", SOURCE)
    monkeypatch.syspath_prepend(str(path))
    monkeypatch.setitem(sys.modules, "modeling_packed", None)  # to be gone after the test
    del sys.modules["modeling_packed"]
    module = importlib.import_module("modeling_packed")
    assert type(module.__loader__).__name__ == "zipimporter"
    own("modeling_packed")
    is_served(module, "modeling_packed")


def test_what_a_notebook_keeps_in_linecache_is_patched(
    own: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = "<ipython-input-7-0123456789ab>"
    entry = len(SOURCE), None, SOURCE.splitlines(keepends=True), file
    monkeypatch.setitem(linecache.cache, file, entry)
    own("typed_in_a_notebook")
    is_served(typed("typed_in_a_notebook", file, monkeypatch), "typed_in_a_notebook")


def test_what_nobody_kept_is_left_alone_with_the_reason(
    own: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = typed("typed_in_a_repl", "<stdin>", monkeypatch)
    before = module.OwnNorm.forward, module.OwnMLP.forward
    own("typed_in_a_repl")
    with (
        pytest.warns(KernelPatchWarning, match="cannot be read"),
        hf_kernel_patch.patched("rms_norm,swiglu", models="typed_in_a_repl") as report,
    ):
        assert (module.OwnNorm.forward, module.OwnMLP.forward) == before
    assert [row.outcome for row in report] == ["skipped", "skipped"]
    assert {row.reason for row in report} == {"the source of typed_in_a_repl cannot be read"}


PROGRAM = f"""{SOURCE}
import hf_kernel_patch, warnings
from hf_kernel_patch import Architecture, register_model

register_model(Architecture("typed", {ROWS}, module="__main__"))
before = OwnNorm.forward, OwnMLP.forward
warnings.simplefilter("ignore")
report = hf_kernel_patch.patch_transformers("rms_norm,swiglu", models="typed")
print([row.outcome for row in report], {{row.reason for row in report}})
print((OwnNorm.forward, OwnMLP.forward) == before)
OwnMLP()(torch.randn(3, 8))
"""


def test_python_c() -> None:
    ran = run_python(PROGRAM)
    assert ran.returncode == 0, ran.stderr
    reason = "the source of __main__ cannot be read"
    assert ran.stdout.splitlines() == [f"['skipped', 'skipped'] {{{reason!r}}}", "True"]
