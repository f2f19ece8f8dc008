"""The plugin for pytest, tried with tests of its own."""

from __future__ import annotations

import configparser
from typing import Any

import pytest

import hf_kernel_patch
from tests.support.pages import ROOT, blocks
from tests.support.probes import NORM, ROPE, SWIGLU, logits
from tests.support.tiny import tiny_model

PLUGIN = ("-p", "hf_kernel_patch_pytest", "-p", "no:cacheprovider")
LEAKS = (*PLUGIN, "--hf-kernel-patch-leaks", "-v")
START = """
import pytest
import hf_kernel_patch as h
from tests.support.tiny import tiny_model
NORM = "torch_fused_rmsnorm"
patched = lambda: [row.kernel for row in h.status().patched]
"""


@pytest.fixture(autouse=True)
def everything_imported() -> None:
    """The tests' own run forgets what it imports, and torch cannot be imported twice."""
    from hf_kernel_patch.integrations import leaks

    assert not leaks.in_force()
    model = tiny_model("llama")
    with hf_kernel_patch.patched(f"{NORM},{ROPE},{SWIGLU}", models="llama"):
        logits(model)
    hf_kernel_patch.unpatch(hf_kernel_patch.apply_kernel(NORM, model=model))


def outcomes(pytester: pytest.Pytester, text: str, **expected: int) -> Any:
    """The run of some tests with the option, in this process."""
    pytester.makepyfile(START + text)
    result = pytester.runpytest_inprocess(*LEAKS)
    result.assert_outcomes(**expected)
    return result


def test_a_test_that_leaves_a_patch_fails_whatever_its_scope(pytester: pytest.Pytester) -> None:
    result = outcomes(
        pytester,
        """
model = tiny_model("llama")

def test_all_models(): h.patch_transformers(NORM, models="llama")
def test_clean(): assert not patched()
def test_again(): h.patch_transformers(NORM, models="llama"); assert patched() == [NORM]
def test_block(): h.patched("rms_norm", models="llama").__enter__()
def test_clean_again(): assert not patched()
def test_one_model(): h.apply_kernel(NORM, model=model)
def test_clean_at_last(): assert not patched() and type(model.model.norm).__name__ == "LlamaRMSNorm"
def test_own_model(): h.apply_kernel(NORM, model=tiny_model("llama"))
def test_ended():
    with h.patched(NORM, models="llama"): assert patched()
    h.unpatch(h.apply_kernel(NORM, model=model))
def test_raises():
    h.patch_transformers(NORM, models="llama")
    raise ZeroDivisionError
""",
        passed=9,
        failed=1,
        errors=5,
    )
    for name in ("all_models", "again", "block", "one_model", "raises"):
        result.stdout.fnmatch_lines(f"*::test_{name} leaves patches in force:")
    result.stdout.fnmatch_lines("all models: 1 patched; kernels: torch_fused_rmsnorm")
    result.stdout.fnmatch_lines("one LlamaForCausalLM: 1 patched; kernels: torch_fused_rmsnorm")
    assert not hf_kernel_patch.status().rows


def test_what_a_wider_fixture_patches_may_stay_until_it_ends(pytester: pytest.Pytester) -> None:
    result = outcomes(
        pytester,
        """
@pytest.fixture(scope="class")
def whole():
    with h.patched(NORM, models="llama"): yield

@pytest.fixture(scope="class")
def forgets():
    h.patch_transformers("rope", models="llama")

class TestOne:
    def test_first(self, whole): assert patched() == [NORM]
    def test_second(self, whole): assert patched() == [NORM]
    def test_leaves(self, whole): h.patch_transformers("swiglu", models="llama")
    def test_third(self, whole): assert patched() == [NORM]

class TestTwo:
    def test_first(self, forgets): assert patched() == ["torch_fused_rope"]
    def test_second(self, forgets): assert patched() == ["torch_fused_rope"]

def test_after(): assert not patched()
""",
        passed=7,
        errors=2,
    )
    result.stdout.fnmatch_lines("*::TestOne::test_leaves leaves patches in force:")
    result.stdout.fnmatch_lines("*::TestTwo::test_second leaves patches in force:")


def test_what_is_patched_before_the_tests_is_no_leak(pytester: pytest.Pytester) -> None:
    with hf_kernel_patch.patched("rms_norm", models="llama"):
        outcomes(
            pytester,
            """
def test_still(): assert patched() == [NORM]
def test_leaves(): h.patch_transformers("rope", models="llama")
def test_restored(): assert patched() == [NORM]
""",
            passed=3,
            errors=1,
        )


def test_the_fixture_patches_for_one_test(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", "swiglu")
    monkeypatch.setenv("HF_KERNEL_PATCH_MODELS", "llama")
    outcomes(
        pytester,
        """
@pytest.mark.hf_kernel_patch(NORM, models="llama")
def test_marked(patched_transformers):
    assert [row.kernel for row in patched_transformers.patched] == patched() == [NORM]

@pytest.mark.hf_kernel_patch(models="llama")
@pytest.mark.parametrize("patched_transformers", ["rope", {"include": ["rope"]}], indirect=True)
def test_parameters(patched_transformers):
    assert patched() == ["torch_fused_rope"]

@pytest.mark.usefixtures("patched_transformers")
def test_by_the_environment():
    assert patched() == ["torch_fused_swiglu"]

def test_not(): assert not patched()

@pytest.mark.hf_kernel_patch("rms_nrm")
def test_wrong(patched_transformers): pass
""",
        passed=5,
        errors=1,
    )


def test_the_example_of_its_page_runs(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(blocks("testing.md", "python")[0])
    pytester.runpytest_inprocess(*LEAKS).assert_outcomes(passed=3)


def test_without_the_option_and_the_fixture_nothing_is_imported(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", "rms_norm")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(
        "import sys\n"
        "def test_it():\n"
        "    assert 'hf_kernel_patch_pytest' in sys.modules\n"
        "    assert not {'hf_kernel_patch', 'torch', 'transformers'} & {*sys.modules}\n"
    )
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)


def test_pytest_loads_it_where_the_package_is_installed() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    (line,) = settings["options.entry_points"]["pytest11"].split("\n")[1:]
    name, _, module = line.partition(" = ")
    assert name == module == "hf_kernel_patch_pytest"  # so that it is not loaded twice
    assert settings["options"]["py_modules"] == module
