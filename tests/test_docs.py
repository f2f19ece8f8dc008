"""The documentation: its examples run, its tables are those of the code."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hf_kernel_patch
from hf_kernel_patch import registry
from hf_kernel_patch.cli.commands import app
from hf_kernel_patch.models import architectures
from hf_kernel_patch.recognition import known
from tests.support.pages import PAGES, ROOT, blocks, table
from tests.support.reasons import reasons
from tests.support.tiny import tiny_model, tokens


def run(directory: Path, code: str) -> str:
    """What a program of its own prints that finds what is in the directory."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_kernel_and_an_op_of_one_s_own(tmp_path: Path) -> None:
    for number, example in enumerate(blocks("kernels.md", "python")):
        (tmp_path / f"example_{number}.py").write_text(example)
    printed = run(tmp_path, "import example_0, example_1, example_2")
    (promised,) = blocks("kernels.md", "text")
    # the accelerator in use depends on the machine
    assert [line.partition(" use here")[0] for line in printed.splitlines()] == [
        line.partition(" use here")[0] for line in promised.splitlines()
    ]


def test_an_architecture_of_one_s_own(tmp_path: Path) -> None:
    for example in blocks("architectures.md", "python"):
        name = example.partition("\n")[0].removeprefix("# ")
        (tmp_path / name).write_text(example)
    assert [run(tmp_path, "import patch_my_model")] == blocks("architectures.md", "text")


def test_readme_and_settings_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(model: Any) -> None:
        trained.append([row.op for row in hf_kernel_patch.status()])

    monkeypatch.chdir(tmp_path)
    (config,) = blocks("settings.md", "yaml")
    Path("train.yaml").write_text(config)
    names = {"model": tiny_model("llama"), "train": train}
    for page in ("README.md", "settings.md", "patched.md"):
        for example in blocks(page, "python"):
            exec(example, names)
            assert not hf_kernel_patch.status().rows
    assert trained == [["rms_norm", "rope"], ["linear_cross_entropy"]]


def test_quickstart_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"model": tiny_model("llama").train(), "train": step}
    for example in blocks("quickstart.md", "python"):
        exec(example, names)
    assert "modeling_llama.LlamaRMSNorm.forward" in capsys.readouterr().out
    assert not hf_kernel_patch.status().rows


def step(model: Any) -> None:
    """One call of a model."""
    model(tokens())


@pytest.mark.parametrize("page", ["training.md", "adapters.md", "verify.md"])
def test_the_first_example_of_a_page_runs(page: str) -> None:
    pytest.importorskip("peft")
    exec(blocks(page, "python")[0], {})
    assert not hf_kernel_patch.status().rows


def test_a_page_shows_what_the_commands_print(monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = blocks("patched.md", "console")
    command, _, output = shown.partition("\n")
    variable, _, value = command.split()[1].partition("=")
    monkeypatch.setenv(variable, value)
    assert command.split()[2] == "hf-kernel-patch"
    assert CliRunner().invoke(app, command.split()[3:]).stdout == output


def covers(listed: str, reason: str) -> bool:
    """Whether a reason of the code begins as one that a page lists."""
    return reason.startswith(listed.removesuffix("…").rstrip())


def test_every_reason_of_a_report_is_explained_and_no_other() -> None:
    _, _, page = PAGES["troubleshooting.md"].partition("## Reasons in the report")
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    listed = [reason for cell in cells for reason in re.findall("`([^`]+)`", cell)]
    given = set(reasons())
    assert len(given) > 200
    assert [one for one in sorted(given) if not any(covers(two, one) for two in listed)] == []
    assert [one for one in listed if not any(covers(one, two) for two in given)] == []


def test_leaves_and_rules_are_all_listed() -> None:
    listed = {
        name.strip("`"): op.strip("`") for name, op, _ in table("architectures.md", "leaf or rule")
    }
    assert listed == {code.name: code.op for code in known().values()}


def test_ops_are_all_listed_with_their_arguments() -> None:
    listed = {op.strip("`"): words.split("`")[1] for op, words in table("kernels.md", "op")}
    assert listed.keys() == registry.ops()
    for op, arguments in listed.items():
        function = pkgutil.resolve_name(f"hf_kernel_patch.ops.{op}.reference:{op}")
        taken = ", ".join(inspect.signature(function).parameters)
        assert taken.startswith(arguments), f"{op} takes {taken}"


def test_a_page_names_every_architecture_and_every_op_that_replaces_code() -> None:
    rows = [[cell.strip("`") for cell in row] for row in table("patched.md", "op")]
    tables = [one for architecture in architectures().values() for one in architecture.sites]
    of_models = {known()[spec.code].op for spec in tables}
    assert {op for op, *_ in rows} == {*of_models, known()["lora"].op}
    assert {registry.kernels()[kernel].op: kernel for *_, kernel in rows} == {
        op: kernel for op, _, kernel in rows
    }
    (line,) = re.findall(r"^Architectures: (.*?)\.$", PAGES["patched.md"], re.DOTALL | re.MULTILINE)
    assert re.findall(r"`(\w+)`", line) == sorted(architectures())
    short = [op for cell, *_ in table("README.md", "op") for op in re.findall(r"`(\w+)`", cell)]
    assert sorted(short) == sorted(op for op, *_ in rows)


def test_speeds_are_those_that_were_measured() -> None:
    """The page's numbers are in the results, and README's ratios are theirs."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    rows = [
        [re.findall(r"^[\d.]+", cell) for cell in row[1:]] for row in table("faq.md", "measured")
    ]
    numbers = [number for row in rows for cell in row for number in cell]
    assert len(numbers) == 14
    assert [number for number in numbers if f"| {number} |" not in results] == []
    first, _, second, _ = [[float(*cell) if cell else 0.0 for cell in row] for row in rows]
    told = re.findall(r"(\d\.\d\d) times", PAGES["README.md"])
    ratios = [first[3] / other for other in first[:3]] + [second[3] / second[0]]
    ratios.append(second[3] / second[2])
    assert told == [f"{ratio:.2f}" for ratio in ratios]


def test_the_site_has_every_page() -> None:
    pages = set(
        re.findall(r"([\w.]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    )
    assert PAGES.keys() - {"README.md"} <= pages
    assert "index.md" in pages


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    base = ROOT if page == "README.md" else ROOT / "docs"
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        path = base / target if target else base / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text("utf-8")), f"{target}#{anchor}"


def anchors(page: str) -> set[str]:
    """What links to the headings of a page end with."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tests_that_a_page_names_are_there() -> None:
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)`", PAGES["guarantees.md"])
    assert len(named) > 15
    assert {name for name in named if not (ROOT / "tests" / name).exists()} == set()


def test_ci_runs_the_readme_s_second_command() -> None:
    commands = blocks("README.md", "sh")
    assert len(commands) == 2
    assert commands[1].strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
