"""A ``kernel_config`` in a training file: what asks for nothing, and what is told of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hf_kernel_patch
from hf_kernel_patch import load_kernel_config
from hf_kernel_patch.settings import Settings, resolve
from tests.support.probes import NORM, ROPE

TRAINING = "model_name_or_path: some/model\nname: run-1\nliger_kernel_config: {rope: true}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "train.yaml"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (TRAINING, "train.yaml has no kernel_config"),
        (f"{TRAINING}kernel_config:\n", "kernel_config of FILE has no value"),
        (f"{TRAINING}kernel_config: null\n", "kernel_config of FILE has no value"),
        (f"{TRAINING}kernel_config: {{}}\n", "kernel_config of FILE has no include_kernels"),
        ("kernel_config: {name: auto}\n", "kernel_config of FILE has no include_kernels"),
        ("kernel_config: {include_kernels: null}\n", "no kernel is chosen"),
        ("", "train.yaml is empty"),
        ("# a comment\n---\n", "train.yaml is empty"),
    ],
)
def test_a_file_that_asks_for_nothing_patches_nothing_and_says_why(
    text: str, why: str, file: Path
) -> None:
    file.write_text(text, encoding="utf-8")
    report = hf_kernel_patch.patch_transformers(config=file)
    assert not report.rows and not hf_kernel_patch.status().rows
    assert report.note.endswith(why.replace("FILE", str(file)))
    assert resolve(file) == Settings(include=None)
    assert resolve(file, include=NORM).include == (NORM,)


def test_a_mapping_that_asks_for_nothing_does_the_same() -> None:
    for source in ({"learning_rate": 1e-4}, {"kernel_config": None}, {}):
        assert load_kernel_config(source).include is None
        assert load_kernel_config(source).why_nothing


@pytest.mark.parametrize("key", ["strict", "models", "backend", "exclude", "options"])
def test_null_is_the_default(key: str, file: Path) -> None:
    file.write_text(f"kernel_config: {{include_kernels: rope, {key}: null}}\n", encoding="utf-8")
    assert resolve(file) == Settings(include=("rope",))


@pytest.mark.parametrize("given", [1, 0, True, False, "1", "off"])
def test_strict_is_1_or_0_or_a_truth(given: Any, file: Path) -> None:
    file.write_text(f"kernel_config: {{include_kernels: rope, strict: {given}}}", encoding="utf-8")
    wanted = given not in (0, False, "off")
    assert resolve(file).strict is resolve(strict=given).strict is wanted


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"a: 1\nkernel_config: {name: [auto\nb: 2\n", "expected ',' or ']'.* in line 3"),
        (b"a: 1\nkernel_config: \xff\n", "is not in UTF-8: .* in line 2"),
        ("kernel_config:\n  name: auto\n".encode("utf-16"), "is not in UTF-8: .* in line 1"),
        (b"a: 1\n\nb: \x07\n", "special characters are not allowed in line 3|in line 3"),
        (b"a: 1\nb: 2026-13-41\n", "month must be in 1..12.*, in line 2"),
        (b"a:\n  b: " + b"9" * 5000, "Exceeds the limit.*, in line 2"),
        (b"a: 1\n\tb: 2\n", r"cannot start any token, in line 2"),
        (b"a: *nowhere\n", "undefined alias 'nowhere', in line 1"),
        (b"a: !!nothing 3\n", "could not determine a constructor.*, in line 1"),
        (b"a: 1\nb: " + b"[" * 10**4, "is nested too deeply to be read, in line 2"),
    ],
    ids=["bracket", "byte", "utf-16", "bell", "date", "number", "tab", "alias", "tag", "depth"],
)
def test_what_is_no_yaml_is_named_with_its_line(data: bytes, wanted: str, file: Path) -> None:
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"(?s)train\.yaml .*({wanted})") as caught:
        hf_kernel_patch.patched(config=file)
    assert len(str(caught.value)) < 600


def test_a_file_with_a_byte_order_mark_is_read(file: Path) -> None:
    file.write_text("kernel_config: {include_kernels: rope}\n", encoding="utf-8-sig")
    assert resolve(file).include == ("rope",)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("kernel_config: {include_kernels: rms_nrm}", "'rms_nrm' in include_kernels in kernel_con"),
        ("kernel_config: {name: nonsense}", "'nonsense' in name in kernel_config of .*train"),
        (f"kernel_config: {{name: 'x,{ROPE}', include_kernels: null}}", "'x' in name in"),
        ("kernel_config: {name: nonsense, include_kernels: rope}", "'nonsense' in name in"),
        ("include_kernel: auto", "'include_kernel'; did you mean 'include_kernels'"),
        (f"{TRAINING}kernal_config: {{}}", "'kernal_config'; did you mean 'kernel_config'"),
        (f"{TRAINING}Kernel_Config: {{}}", "'Kernel_Config'; did you mean 'kernel_config'"),
        ("include_kernels: auto\nlearning_rate: 1", "unknown key in .* 'learning_rate'"),
    ],
)
def test_a_wrong_name_is_refused_when_it_is_read(text: str, wanted: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"(?s){wanted}.*Known: "):
        load_kernel_config(file)
    with pytest.raises(ValueError, match=rf"(?s){wanted}.*Known: "):
        hf_kernel_patch.patched(config=file, include=NORM)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("kernel_config: {include_kernels: 3}", "include_kernels in kernel_config of .*, not 3"),
        ("kernel_config: {include_kernels: rope, strict: maybe}", "strict in kernel_config of .*"),
        ("kernel_config: {include_kernels: rope, models: lama}", "'lama' in models in kernel_conf"),
        ("kernel_config: {include_kernels: rope, backend: [x]}", "backend in kernel_config of .*"),
        (
            "kernel_config: auto",
            r"a mapping such as \{include_kernels: auto\}, got 'auto'",
        ),
    ],
)
def test_a_wrong_value_is_named_by_the_key_of_the_file(text: str, wanted: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises((ValueError, TypeError), match=wanted):
        hf_kernel_patch.patched(config=file)


def test_an_argument_is_named_as_the_function_calls_it() -> None:
    from tests.support.tiny import tiny_model

    with pytest.raises(TypeError, match="the argument include_kernels must be"):
        hf_kernel_patch.apply_default_kernels(tiny_model("llama"), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the argument include must be"):
        hf_kernel_patch.patched(3)  # type: ignore[arg-type]
