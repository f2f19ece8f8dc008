"""docs/settings.md says what there is: variables, arguments, keys, options and commands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import hf_kernel_patch
from hf_kernel_patch import settings
from hf_kernel_patch.cli.autopatch import ending
from hf_kernel_patch.cli.commands import app
from hf_kernel_patch.patching.report import PatchReport
from tests.support.pages import PAGES, blocks, table

PAGE = "settings.md"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_variable_is_listed_but_those_that_commands_set() -> None:
    listed = {words(row[0])[0] for row in table(PAGE, "variable")}
    own = {f"HF_KERNEL_PATCH_{name}" for name in ("REPORT", "REPORTER", "BISECTION")}
    assert listed == set(settings.VARIABLES) - own


def test_every_choice_has_its_argument_variable_and_key() -> None:
    rows = table(PAGE, "what")
    arguments = [words(row[1])[0] for row in rows]
    assert sorted(arguments) == sorted(settings.FIELDS)
    taken = inspect.signature(hf_kernel_patch.patch_transformers).parameters
    assert set(arguments) <= set(taken)
    for _, argument, variable, keys, _ in rows:
        name = words(argument)[0]
        assert words(variable) == [settings.variable_of(name)]
        assert name in words(keys) or name == "include"


def test_every_command_and_option_of_run_is_named() -> None:
    named = {words(row[0])[0].split()[0] for row in table(PAGE, "command")}
    assert named >= {"list", "table", "status", "diff", "doctor", "run", "demo"}
    assert named <= COMMANDS.keys()
    (text,) = re.findall(r"Options of `run` go before the script: (.*?)\. ", PAGES[PAGE], re.S)
    options = [f"--{one.name}" for one in COMMANDS["run"].params if one.name != "arguments"]
    assert sorted(words(text)) == sorted(options)
    (first_six, of_status) = (words(text)[:6], {f"--{p.name}" for p in COMMANDS["status"].params})
    assert set(first_six) <= of_status


def test_the_report_has_the_keys_that_are_listed() -> None:
    listed = {name for row in table(PAGE, "key") for name in words(row[0])}
    assert ending._report().keys() == listed | PatchReport().as_dict().keys()


def test_the_configuration_file_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = blocks(PAGE, "yaml")
    Path("train.yaml").write_text(text, encoding="utf-8")
    (code,) = blocks(PAGE, "python")
    patch, unpatch = code.strip().splitlines()
    exec(patch)
    report = hf_kernel_patch.status()
    assert {row.op for row in report} == {"rms_norm", "linear_cross_entropy"}
    assert {row.architecture for row in report} == {"llama", "qwen3"}
    exec(unpatch)
    assert not hf_kernel_patch.status().rows
