"""What is asked for: arguments, environment, config and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hf_kernel_patch
from hf_kernel_patch import settings
from hf_kernel_patch.settings import UNSET, KernelConfig, Settings, load_kernel_config, resolve
from tests.support.probes import NORM, ROPE

# name -> variable, (argument and what it is read as), the same from the environment and a config
LEVELS: dict[str, tuple[str, tuple[Any, Any], tuple[str, Any], tuple[Any, Any]]] = {
    "include": ("HF_KERNEL_PATCH", (NORM, (NORM,)), (ROPE, (ROPE,)), ("rope", ("rope",))),
    "exclude": (
        "HF_KERNEL_PATCH_EXCLUDE",
        (("moe", "rope"), ("moe", "rope")),
        ("moe, swiglu", ("moe", "swiglu")),
        ("swiglu", ("swiglu",)),
    ),
    "models": (
        "HF_KERNEL_PATCH_MODELS",
        (["llama"], ("llama",)),
        ("qwen2, qwen3", ("qwen2", "qwen3")),
        ("gemma", ("gemma",)),
    ),
    "backend": ("HF_KERNEL_PATCH_BACKEND", ("torch", "torch"), ("NPU", "npu"), ("triton",) * 2),
    "strict": ("HF_KERNEL_PATCH_STRICT", (False, False), ("1", True), (False, False)),
    "options": (
        "HF_KERNEL_PATCH_OPTIONS",
        ({"a": {"b": 1, "c": None}, "d": {}}, (("a", "b", 1), ("a", "c", None))),
        ("a.b=1, c.d = x y ", (("a", "b", "1"), ("c", "d", "x y"))),
        ({"a": {"b": True}}, (("a", "b", True),)),
    ),
}


@pytest.mark.parametrize("name", LEVELS)
def test_argument_wins_over_environment_over_config_over_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, (argument, first), (text, second), (value, third) = LEVELS[name]
    config = KernelConfig(**{name: value})
    assert getattr(resolve(), name) == getattr(Settings(), name)
    assert getattr(resolve(config), name) == third
    monkeypatch.setenv(variable, text)
    assert getattr(resolve(), name) == second
    assert getattr(resolve(config), name) == second
    assert getattr(resolve(config, **{name: UNSET}), name) == second
    assert getattr(resolve(config, **{name: argument}), name) == first


def test_an_argument_of_none_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", "auto")
    assert resolve(KernelConfig(include=NORM), include=None).include is None


def test_exclude_comes_from_an_argument_the_variable_or_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert resolve(KernelConfig(exclude="moe")).exclude == ("moe",)
    monkeypatch.setenv("HF_KERNEL_PATCH_EXCLUDE", "rope, *.LlamaMLP.forward")
    assert resolve(KernelConfig(exclude="moe")).exclude == ("rope", "*.LlamaMLP.forward")


def test_exclude_may_be_repeated_or_none() -> None:
    assert resolve(exclude=("moe", "rope", "moe")).exclude == ("moe", "rope")
    assert resolve(exclude=None).exclude == ()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("exact", ValueError, "op.option=value"),
        ("exact=1", ValueError, "op.option=value"),
        ({"linear_cross_entropy": "exact"}, TypeError, "mappings of options"),
        (["exact"], TypeError, "mappings of options"),
    ],
)
def test_options_that_cannot_be_read_are_told(
    value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve(options=value)
    assert resolve(options=None).options == ()


@pytest.mark.parametrize("blank", ["", "   "])
@pytest.mark.parametrize("name", LEVELS)
def test_a_blank_variable_counts_as_not_set(
    name: str, blank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEVELS[name][0], blank)
    assert resolve() == Settings()


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("auto", "auto"),
        (True, "auto"),
        ("1", "auto"),
        ("True", "auto"),
        (" AUTO ", "auto"),
        (None, None),
        (False, None),
        ("0", None),
        ("false", None),
        ("null", None),
        ("", None),
        (NORM, (NORM,)),
        (f" {NORM} ,rope,, ", (NORM, "rope")),
        ([NORM, "rope", NORM], (NORM, "rope")),
        ((name for name in ("rope",)), ("rope",)),
        ((), ()),
    ],
)
def test_spellings_of_include(value: Any, read: Any) -> None:
    assert settings.read_include(value) == read


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"include": 3}, TypeError, "include must be a string or an iterable of strings, not 3"),
        ({"include": b"rope"}, TypeError, "include"),
        ({"include": {"rope": True}}, TypeError, "include"),
        ({"include": ["rope", 3]}, TypeError, "include holds 3"),
        ({"include": "auto,rope"}, ValueError, "'auto' stands alone"),
        ({"exclude": 3}, TypeError, "exclude"),
        ({"models": 3}, TypeError, "models"),
        ({"models": [None]}, TypeError, "models holds None"),
        ({"backend": ["torch"]}, TypeError, "backend must be a string"),
        ({"strict": "perhaps"}, ValueError, "strict must be one of 1, 0, true, false"),
        ({"strict": 2}, ValueError, "strict"),
        ({"config": 3}, TypeError, "kernel_config"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    for call in (hf_kernel_patch.patch_transformers, hf_kernel_patch.patched):
        with pytest.raises(error, match=message):
            call(**arguments)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("HF_KERNEL_PATCH", "auto,rope"),
        ("HF_KERNEL_PATCH", "torch_fused_rmsnrom"),
        ("HF_KERNEL_PATCH_MODELS", "lama"),
        ("HF_KERNEL_PATCH_BACKEND", "tritn"),
        ("HF_KERNEL_PATCH_STRICT", "perhaps"),
        ("HF_KERNEL_PATCH_DISABLE", "perhaps"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as environment:
        environment.setenv(variable, text)
        with pytest.raises(ValueError, match=rf"{variable}\b"):
            hf_kernel_patch.patch_transformers()


def test_count_flag_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH_COUNT", "perhaps")
    with pytest.raises(ValueError, match="HF_KERNEL_PATCH_COUNT"):
        settings.flag("COUNT")


@pytest.mark.parametrize(("text", "asked"), [("1", True), ("0", False), ("", False), (NORM, True)])
def test_environment_asks_for_patching_at_import(
    text: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", text)
    assert settings.requested_by_environment() is asked


@pytest.mark.parametrize(
    ("variables", "first"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "3"}, False), ({"LOCAL_RANK": "1"}, False)],
)
def test_rank_zero_is_told_from_the_launchers_variables(
    variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert settings.is_rank_zero() is first


@pytest.mark.parametrize(
    ("text", "include"),
    [
        ("{name: auto, include_kernels: auto}", "auto"),
        ("{name: auto, include_kernels: true}", "auto"),
        ("{name: auto, include_kernels: false}", None),
        ("{name: auto, include_kernels: null}", None),
        ("{name: auto, include_kernels: }", None),
        ("{name: auto}", None),
        ("{}", None),
        ("{include_kernels: auto}", "auto"),
        (f"{{name: auto, include_kernels: '{NORM},{ROPE}'}}", (NORM, ROPE)),
        (f"{{name: auto, include_kernels: [{NORM}, {ROPE}]}}", (NORM, ROPE)),
        (f"{{name: {NORM}}}", (NORM,)),
        (f"{{name: '{NORM},{ROPE}', include_kernels: true}}", (NORM, ROPE)),
        (f"{{name: {NORM}, include_kernels: auto}}", (NORM,)),
        (f"{{name: {NORM}, include_kernels: null}}", None),
        (f"{{name: {NORM}, include_kernels: false}}", None),
    ],
)
@pytest.mark.parametrize("form", ["file", "path", "key", "mapping"])
def test_kernel_config_says_what_to_include(
    text: str, include: Any, form: str, tmp_path: Path
) -> None:
    import yaml

    file = tmp_path / "config.yaml"
    wrapped = f"model: unused\nkernel_config: {text}\n" if form in ("file", "key") else text
    file.write_text(wrapped, encoding="utf-8")
    source = {"file": str(file), "path": file}.get(form, yaml.safe_load(wrapped))
    config = load_kernel_config(source)
    assert resolve(config) == Settings(include=include)
    assert not hf_kernel_patch.status().rows


def test_kernel_config_holds_the_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "include_kernels: auto\nexclude: rope,moe\nmodels: [llama]\nbackend: torch\nstrict: true\n",
        encoding="utf-8",
    )
    assert resolve(file) == Settings("auto", ("rope", "moe"), ("llama",), "torch", True)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            {"include_kernel": "auto"},
            ValueError,
            "'include_kernel'; did you mean 'include_kernels'",
        ),
        ({"kernel_config": {1: 2}}, ValueError, "unknown key in kernel_config '1'"),
        ({"include_kernels": 3}, TypeError, "include_kernels in kernel_config"),
        ({"name": 3}, TypeError, "name in kernel_config"),
        ({"kernel_config": ["auto"]}, TypeError, "expected a mapping"),
        (["auto"], TypeError, "expected a mapping"),
        (True, TypeError, "expected a mapping"),
    ],
)
def test_a_kernel_config_that_is_wrong_is_refused_by_name(
    source: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_kernel_config(source)


@pytest.mark.parametrize("field", ["models", "strict", "backend", "exclude"])
def test_a_value_of_kernel_config_that_cannot_be_read_is_named(field: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{field} in kernel_config"):
        resolve({"include_kernels": "auto", field: 3})


def test_a_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_kernel_config(tmp_path / "nowhere.yaml")
    file = tmp_path / "list.yaml"
    file.write_text("- auto\n", encoding="utf-8")
    with pytest.raises(TypeError, match=r"list\.yaml"):
        load_kernel_config(file)
    file.write_text("kernel_config: {nmae: auto}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.yaml 'nmae'; did you mean 'name'"):
        load_kernel_config(str(file))
