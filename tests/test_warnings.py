"""Warnings point at the line of this file that led to them."""

from __future__ import annotations

import ast
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest

import hf_kernel_patch as h
from hf_kernel_patch.errors import KernelPatchWarning, warn
from tests.support.probes import run_python
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that a table expects has other code."""
    from transformers.models.llama import modeling_llama

    def forward(self: Any, hidden_states: Any) -> Any:
        return hidden_states

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


CHOICE = {"include": "rms_norm", "models": "llama"}


def _block() -> None:
    with h.patched(**CHOICE):  # type: ignore[arg-type]
        pass


@h.patched("torch_fused_rmsnorm", models="llama")
def _decorated() -> None:
    pass


class _Owner:
    @h.patched("torch_fused_rmsnorm", models="llama")
    def method(self) -> None:
        pass

    @h.patched("torch_fused_rmsnorm", models="llama")
    @staticmethod
    def static() -> None:
        pass


def line_of(function: Any, text: str) -> set[int]:
    """The lines of a function of this file that hold a text."""
    lines, first = inspect.getsourcelines(function)
    return {first + n for n, line in enumerate(lines) if text in line}


def test_a_warning_points_at_the_line_of_the_user(broken: None) -> None:
    def calls() -> None:
        h.patch_transformers(**CHOICE)  # type: ignore[arg-type] # here
        h.unpatch()
        _decorated()  # here
        _Owner().method()  # here
        _Owner.static()  # here

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls()
        _block()
    told = [one for one in caught if issubclass(one.category, KernelPatchWarning)]
    assert len(told) == 5
    assert {one.filename for one in told} == {__file__}
    here = line_of(calls, "# here") | line_of(_block, "with h.patched")
    assert {one.lineno for one in told} == here


def test_a_warning_about_one_model_points_at_the_line_of_the_user(model: Any) -> None:
    def call() -> None:
        h.apply_kernel("torch_fused_moe", model=model)

    with pytest.warns(KernelPatchWarning, match="found no site") as caught:
        call()
    assert {(one.filename, one.lineno) for one in caught} == {
        (__file__, *line_of(call, "apply_kernel"))
    }


def test_a_warning_of_an_import_points_at_the_import(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import warnings, runpy, sys\n"
        "import hf_kernel_patch as h\n"
        "h.register_model(h.Architecture('llama', {'Gone.forward': 'rms_norm.llama'}))\n"
        "h.patch_transformers('rms_norm', models='llama', backend='torch')\n"
        "from transformers import LlamaForCausalLM  # here\n"
    )
    done = run_python(f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')")
    assert done.returncode == 0, done.stderr
    assert f"{program}:5: KernelPatchWarning: transformers.models.llama" in done.stderr


def test_a_warning_without_a_user_is_told_all_the_same() -> None:
    scope: dict[str, Any] = {"__name__": "torch.somewhere", "warn": warn}
    with pytest.warns(UserWarning, match="told"):
        exec("warn('told')", scope)


def test_no_other_file_warns_at_a_fixed_depth_of_a_deep_call() -> None:
    root = Path(h.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            depth = [k.value for k in getattr(node, "keywords", ()) if k.arg == "stacklevel"]
            assert all(isinstance(d, ast.Constant) and d.value == 2 for d in depth), path
