"""Bounds: of options, of what a message shows, and of what a file may hold; copies of settings."""

from __future__ import annotations

import copy
import math
import pickle
import re
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hf_kernel_patch
from hf_kernel_patch import KernelPatchCallback, registry, settings
from hf_kernel_patch.cli.commands import app
from hf_kernel_patch.errors import LONGEST, shown, unknown
from hf_kernel_patch.settings import UNSET, KernelConfig, load_kernel_config, resolve
from tests.support.probes import places, same, watched_kernel
from tests.support.tiny import tiny_model

LOSS = "linear_cross_entropy"
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle-{protocol}": lambda value, protocol=protocol: pickle.loads(
            pickle.dumps(value, protocol)
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}
copies = pytest.mark.parametrize("way", COPIES)


@copies
def test_unset_is_one_object(way: str) -> None:
    assert COPIES[way](UNSET) is UNSET
    assert COPIES[way]([UNSET])[0] is UNSET


@copies
def test_a_copy_of_a_kernel_config_says_the_same(way: str) -> None:
    for source in ({}, {"include_kernels": "rope", "models": ["llama"], "options": {}}):
        config = load_kernel_config(source)
        copied = COPIES[way](config)
        assert copied == config and resolve(copied) == resolve(config)
        assert copied.backend is UNSET
    assert resolve(COPIES[way](KernelConfig())) == resolve()


@copies
def test_a_copy_of_a_callback_patches_as_the_callback_does(way: str) -> None:
    callback = COPIES[way](KernelPatchCallback(options={LOSS: {"z_loss": 0.1}}))
    assert type(callback) is KernelPatchCallback
    model: Any = tiny_model("llama")
    callback.on_train_begin(model=model)
    assert hf_kernel_patch.status().rows
    callback.on_train_end()
    assert not hf_kernel_patch.status().rows


@copies
def test_a_copy_of_a_callback_in_use_takes_nothing_back(way: str) -> None:
    callback, model = KernelPatchCallback("rms_norm"), tiny_model("llama")
    callback.on_train_begin(model=model)
    copied = COPIES[way](callback)
    copied.on_train_end()
    assert hf_kernel_patch.status().rows
    callback.on_train_end()
    assert not hf_kernel_patch.status().rows


ENDLESS = [math.nan, math.inf, -math.inf, 1e303, 10**400, "nan", "inf", "-Infinity"]
NEGATIVE = [-1, -0.5, "-3", -1e-300]


@pytest.mark.parametrize("value", [*ENDLESS, *NEGATIVE, 0, 0.0, "0", "-0.0"])
def test_memory_is_a_finite_number_above_0(value: Any) -> None:
    wanted = re.escape(f"{LOSS}.memory_mib is a finite number, above 0; not {shown(value)}")
    with pytest.raises(ValueError, match=wanted):
        hf_kernel_patch.patched(LOSS, options={LOSS: {"memory_mib": value}})
    if isinstance(value, str):
        with pytest.raises(ValueError, match=wanted):
            hf_kernel_patch.patched(LOSS, options=f"{LOSS}.memory_mib={value}")


@pytest.mark.parametrize("value", [*ENDLESS, *NEGATIVE])
def test_z_loss_is_a_finite_number_of_at_least_0(value: Any) -> None:
    before = places()
    model = tiny_model("llama")
    wanted = rf"{LOSS}\.z_loss is a finite number, at least 0; not "
    with pytest.raises(ValueError, match=wanted):
        hf_kernel_patch.patch_transformers(LOSS, options={LOSS: {"z_loss": value}})
    with pytest.raises(ValueError, match=rf"{LOSS}\.z_loss is a finite number"):
        hf_kernel_patch.apply_kernel(f"torch_fused_{LOSS}", model=model, options={"z_loss": value})
    assert same(before, places()) and not hf_kernel_patch.status().rows


@pytest.mark.parametrize("option", ["memory_mib", "z_loss"])
@pytest.mark.parametrize("value", [True, False, [1], {}, (), torch.ones(2), object()])
def test_what_is_no_number_is_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{LOSS}\.{option} is a number, not "):
        hf_kernel_patch.patched(LOSS, options={LOSS: {option: value}})


def test_values_within_the_bounds_are_taken() -> None:
    kernel = registry.kernels()[f"torch_fused_{LOSS}"]
    for option, value, read in [
        ("memory_mib", None, None),
        ("memory_mib", "auto", None),
        ("memory_mib", 0.25, 0.25),
        ("memory_mib", "64", 64.0),
        ("z_loss", 0, 0.0),
        ("z_loss", "0", 0.0),
        ("z_loss", 1e-4, 1e-4),
        ("exact", True, True),
        ("exact", 0, False),
    ]:
        assert registry.options_of(kernel, [(LOSS, option, value)]) == {option: read}


def test_a_kernel_may_declare_bounds_of_its_own() -> None:
    options = {"shift": -1.0, "share": 0.5, "free": 1.0, "rank": None}
    bounds = {"share": (0, 1), "free": (-math.inf, math.inf), "rank": (-1, math.inf)}
    with watched_kernel(options=options, bounds=bounds) as watched:
        kernel = registry.kernels()[watched.kernel_id]

        def read(option: str, value: Any) -> Any:
            return registry.options_of(kernel, [(watched.kernel_id, option, value)])[option]

        assert [read("shift", -5), read("free", -2), read("rank", 0)] == [-5.0, -2.0, 0.0]
        assert [read("share", 0), read("share", 1), read("rank", None)] == [0.0, 1.0, None]
        for option, value, wanted in [
            ("share", 1.5, "a finite number, at least 0, at most 1; not 1.5"),
            ("share", -1, "a finite number, at least 0, at most 1; not -1"),
            ("rank", -2, "a finite number, at least -1; not -2"),
            ("free", math.inf, "a finite number; not inf"),
            ("shift", math.nan, "a finite number; not nan"),
        ]:
            with pytest.raises(ValueError, match=f"own_rmsnorm.{option} is {wanted}"):
                read(option, value)


#: Ten items of ten items, ten times: more characters than a machine can hold.
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]
)
LIMIT = 1500  # with every known name
LOSS_WITH = f"kernel_config: {{include_kernels: {LOSS}, options: {{{LOSS}: "
PLACES = {
    "the-whole": "kernel_config: *a10",
    "include": "kernel_config: {include_kernels: *a10}",
    "name": "kernel_config: {name: *a10}",
    "exclude": "kernel_config: {include_kernels: auto, exclude: *a10}",
    "models": "kernel_config: {include_kernels: auto, models: *a10}",
    "backend": "kernel_config: {include_kernels: auto, backend: *a10}",
    "strict": "kernel_config: {include_kernels: auto, strict: *a10}",
    "options": "kernel_config: {include_kernels: auto, options: *a10}",
    "options-of-an-op": f"kernel_config: {{include_kernels: auto, options: {{{LOSS}: *a10}}}}",
    "a-number": LOSS_WITH + "{z_loss: *a10}}}",
    "a-truth": LOSS_WITH + "{exact: *a10}}}",
}


@pytest.mark.parametrize("place", PLACES)
def test_an_alias_bomb_makes_a_short_message(place: str, tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(f"{BOMB}\n{PLACES[place]}\n", encoding="utf-8")
    start = time.monotonic()
    with pytest.raises((ValueError, TypeError)) as caught:
        hf_kernel_patch.patched(config=file)
    assert time.monotonic() - start < 10
    assert len(str(caught.value)) < LIMIT


@pytest.mark.parametrize(
    "argument",
    [
        {"include": "x" * 10**7},
        {"include": ["x" * 10**7]},
        {"include": ["auto", "x" * 10**7]},
        {"exclude": "x" * 10**7},
        {"models": "x" * 10**7},
        {"backend": "x" * 10**7},
        {"options": "x" * 10**7},
        {"options": {"x" * 10**7: {"exact": 1}}},
        {"options": {LOSS: {"x" * 10**7: 1}}},
        {"options": {LOSS: {"z_loss": "x" * 10**7}}},
        {"options": {LOSS: {"z_loss": 10**10**5}}},
        {"options": {LOSS: {"exact": 10**10**5}}},
        {"config": {"kernel_config": {"x" * 10**7: 1}}},
        {"config": {"kernel_config": {("x",) * 10**6: 1}}},
        {"config": {"strict": "x" * 10**7}},
        {"config": ["x"] * 10**6},
    ],
    ids=lambda argument: shown(argument)[:40],
)
def test_a_long_value_makes_a_short_message(argument: dict[str, Any]) -> None:
    start = time.monotonic()
    with pytest.raises((ValueError, TypeError)) as caught:
        hf_kernel_patch.patched(**{"include": LOSS, **argument})
    assert time.monotonic() - start < 10
    assert len(str(caught.value)) < LIMIT


def test_registering_something_long_makes_a_short_message() -> None:
    for register in (hf_kernel_patch.register_kernel, hf_kernel_patch.register_model):
        with pytest.raises(TypeError) as caught:
            register(["x"] * 10**6)  # type: ignore[type-var, arg-type]
        assert len(str(caught.value)) < LIMIT


def test_a_value_is_shown_as_repr_does_and_cut() -> None:
    for value in ("auto", 3, 1.5, None, True, [1, "x"], {"a": 1}, ("x",), b"x", UNSET, int):
        assert shown(value) == repr(value)
    nested: Any = "x"
    for _ in range(10**5):
        nested = [nested]
    loop: list[Any] = []
    loop.append(loop)
    wide = [["x" * 50] * 50] * 50
    for value in (nested, loop, wide, OrderedDict(a=wide), {"a": {"b": wide}}, "\0" * 999, 9**9999):
        assert len(shown(value)) <= LONGEST
    assert shown("x" * 999).count("x") > 100
    assert "did you mean 'rope'" in str(unknown("op", "ropee", ["rope"]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[" * 10**5, "is nested too deeply"),
        ('{"a":' * 10**5, "is nested too deeply"),
        ('{"model_type": ' + "[" * 500 + "]" * 500 + "}", "model_type is a name, not"),
        ('{"model_type": null}', "model_type is a name, not None"),
        ('{"model_type": "' + "x" * 10**6 + '"}', "unknown model type"),
        ("[]", "names no model_type"),
        ("{}", "names no model_type"),
        ("3 3", "names no model_type"),
    ],
    ids=lambda text: text[:20],
)
def test_a_config_that_cannot_be_read_is_named(text: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    for command in ("status", "diff"):
        result = CliRunner().invoke(app, [command, str(tmp_path)])
        assert result.exit_code == 2, result.output
        assert "config.json" in result.stderr and wanted in result.stderr
        assert "Traceback" not in result.output and len(result.stderr) < LIMIT


def test_a_target_that_is_too_long_for_a_path_is_told() -> None:
    result = CliRunner().invoke(app, ["status", "x" * 10**5])
    assert result.exit_code == 2 and len(result.stderr) < LIMIT
    assert "unknown model type or directory" in result.stderr


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[" * 10**4, "is nested too deeply"),
        ("include_kernels: [", "cannot be read as YAML"),
        (f"include_kernels: {'9' * 5000}", "cannot be read as YAML"),
        ("include_kernels: !!nothing 3", "cannot be read as YAML"),
    ],
    ids=lambda text: text[:20],
)
def test_a_yaml_file_that_cannot_be_read_is_named(text: str, wanted: str, tmp_path: Path) -> None:
    file = tmp_path / "kernels.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"kernels\.yaml {wanted}") as caught:
        settings.load_kernel_config(file)
    assert len(str(caught.value)) < LIMIT
