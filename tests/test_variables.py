"""The variables: those for a child process, and those that nothing reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hf_kernel_patch
from hf_kernel_patch import settings
from hf_kernel_patch.settings import KernelConfig, resolve
from tests.support.probes import NORM


def test_what_a_config_says_goes_to_a_child_unless_the_environment_says_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"linear_cross_entropy": {"exact": True, "z_loss": 0.5}}
    config = KernelConfig(
        include=(NORM, "rope"), exclude="moe", models=["llama"], strict=True, options=options
    )
    monkeypatch.setenv("HF_KERNEL_PATCH_MODELS", "qwen2")
    said = settings.variables_for(config, {"backend": "torch", "exclude": "swiglu"})
    assert said == {
        "include": f"{NORM},rope",
        "exclude": "swiglu",
        "backend": "torch",
        "strict": "1",
        "options": "linear_cross_entropy.exact=True,linear_cross_entropy.z_loss=0.5",
    }
    assert settings.variables_for(KernelConfig(include=None), {}) == {"include": "0"}
    assert settings.variables_for(None, {"include": "rope"}) == {"include": "rope"}
    for name, text in said.items():
        monkeypatch.setenv(settings.variable_of(name), text)
    there = resolve()
    assert (there.include, there.strict) == ((NORM, "rope"), True)
    assert there.options == (
        ("linear_cross_entropy", "exact", "True"),
        ("linear_cross_entropy", "z_loss", "0.5"),
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("HF_KERNEL_PATCH_MODEL", "; did you mean HF_KERNEL_PATCH_MODELS"),
        ("HF_KERNEL_PATCH_DISABEL", "; did you mean HF_KERNEL_PATCH_DISABLE"),
        ("HF_KERNEL_PATCH_backend", "; did you mean HF_KERNEL_PATCH_BACKEND"),
        ("HF_KERNEL_PATCH_ZZZZZ", ". Known: HF_KERNEL_PATCH, HF_KERNEL_PATCH_EXCLUDE, "),
    ],
)
def test_a_variable_that_nothing_reads_is_named(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.unknown_variables() == []
    monkeypatch.setenv(name, "1")
    (told,) = settings.unknown_variables()
    assert told.startswith(f"unknown variable {name}{hint}")


def test_every_variable_that_is_read_is_known() -> None:
    root = Path(hf_kernel_patch.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    named = set(re.findall(r"HF_KERNEL_PATCH_[A-Z]+", text))
    flags = set(re.findall(r'flag\("([A-Z]+)"', text)) | set(re.findall(r"PREFIX}_([A-Z]+)", text))
    read = named | {f"HF_KERNEL_PATCH_{flag}" for flag in flags}
    assert read <= set(settings.VARIABLES)
    assert {settings.variable_of(name) for name in settings.FIELDS} <= set(settings.VARIABLES)
