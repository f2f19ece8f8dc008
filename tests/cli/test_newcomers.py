"""The commands where something is missing, narrow or misspelt."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import hf_kernel_patch
from hf_kernel_patch import devices, models, registry
from hf_kernel_patch.cli import doctor, families, printing
from hf_kernel_patch.cli.commands import app
from tests.cli.commands import invoke
from tests.support.probes import NORM, ROPE, run_python
from tests.support.tiny import tiny_config

COMMAND = (
    "sys.argv = ['hf-kernel-patch', {}]; from hf_kernel_patch.cli.commands import main; main()"
)


def without(packages: list[str], *command: str) -> Any:
    """A command in a Python that cannot import some packages."""
    gone = "".join(f"sys.modules[{name!r}] = None; " for name in packages)
    arguments = ", ".join(map(repr, command))
    return run_python(f"import sys; {gone}{COMMAND.format(arguments)}")


@pytest.mark.parametrize(
    ("packages", "said", "kernels"),
    [
        (["torch"], ["torch is not installed: no kernel can run"], 0),
        (["transformers"], ["transformers is not installed: there is nothing to patch"], None),
        (
            ["torch", "transformers"],
            ["torch is not installed", "transformers is not installed"],
            0,
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_doctor_says_what_is_missing_and_how_far_everything_works(
    packages: list[str], said: list[str], kernels: int | None
) -> None:
    done = without(packages, "doctor")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [part for part in said if part not in done.stdout] == []
    assert all(f"`pip install {name}`" in done.stdout for name in packages)
    assert "what works without: " in done.stdout and "rows, " not in done.stdout
    (count,) = re.findall(r"kernels: (\d+) of \d+ can run here", done.stdout)
    assert (int(count) == 0) is (kernels == 0)


def test_list_and_patching_work_without_torch() -> None:
    done = without(["torch", "transformers"], "list", "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert {one["unavailable"] for one in listed} == {"needs the package torch"}
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import hf_kernel_patch as h\n"
        "print(h.patch_transformers())\n"
        "h.unpatch()\n"
    )
    done = run_python(program)
    assert (done.stdout, done.stderr) == ("nothing patched: torch is not installed\n", "")


def test_doctor_names_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "cannot be imported: OSError: no libcudart"
    monkeypatch.setattr(devices, "why_not_importable", lambda name: why if name == "torch" else "")
    result = invoke("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found["problems"][0].startswith(f"torch {why}: no kernel can run")
    assert found["tables"] == []
    monkeypatch.undo()
    assert devices.why_not_importable("no_such_package") == "is not installed"
    assert devices.why_not_importable("torch") is None


def test_doctor_says_what_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "rows", list)
    text = invoke("doctor").stdout
    available = hf_kernel_patch.get_available_kernels()
    assert f"kernels: {len(available)} of {len(registry.kernels())} can run here" in text
    assert all(name in text for name in hf_kernel_patch.get_default_kernels())


def in_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> str:
    """What a command prints in a terminal of some width."""
    monkeypatch.setattr(
        printing, "_console", lambda: Console(force_terminal=True, width=width, color_system=None)
    )
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_list_breaks_no_id_in_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = in_a_terminal(width, monkeypatch, "list")
    for kernel in registry.kernels().values():
        assert re.search(rf"^ *{kernel.kernel_id} ", text, re.MULTILINE)
        assert re.search(rf"\b{kernel.op}\b", text)
        why = registry.unavailable(kernel)
        assert why is None or f"not available ({why})" in " ".join(text.split())
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width


def test_a_last_column_is_broken_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, width=50, color_system=None, record=True)
    monkeypatch.setattr(printing, "_console", lambda: console)
    printing.print_table(("name", "what"), [("an_id_of_one_word", "several words " * 10)])
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 50 and len(lines) > 3
    assert {word for line in lines[1:] for word in line.split()} == {
        "an_id_of_one_word",
        "several",
        "words",
    }


def test_help_names_the_default_of_every_option() -> None:
    import typer

    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for option in command.params:
            if option.name in ("help", "as_json") or option.required:
                continue
            shown = option.default is not None and getattr(option, "show_default", False)
            text = getattr(option, "help", "") or ""
            told = "default" in text or (shown and option.default is not False)
            assert told or getattr(option, "is_flag", False), f"{name} {option.name}: {text}"


HUB = "some-owner/Some-Model-1B"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub's files of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("command", ["status", "table", "diff"])
def test_a_name_on_the_hub_that_is_not_here_is_told_what_to_do(
    command: str, hub_cache: Path
) -> None:
    result = invoke(command, HUB)
    assert (result.exit_code, result.stdout) == (2, "")
    for part in (f"'{HUB}' is no folder", "local cache", "model type", f"hf download {HUB} config"):
        assert part in result.stderr


def test_a_name_on_the_hub_is_found_in_the_local_cache(hub_cache: Path) -> None:
    repository = hub_cache / "models--some-owner--Some-Model-1B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    tiny_config("qwen3").save_pretrained(repository / "snapshots" / ("0" * 40))
    chosen = ("--include", NORM, "--json")
    assert invoke("status", HUB, *chosen).stdout == invoke("status", "qwen3", *chosen).stdout
    assert "Architecture(" in invoke("table", HUB).stdout


def test_a_file_is_told_to_be_none(tmp_path: Path) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    result = invoke("status", tmp_path / "config.json")
    assert result.exit_code == 2 and "is a file; give the folder" in result.stderr


def rows(*arguments: Any) -> list[dict[str, Any]]:
    result = invoke("status", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return list(json.loads(result.stdout)["rows"])


def test_status_takes_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", "swiglu")
    assert {row["op"] for row in rows("llama")} == {"swiglu"}
    assert {row["kernel"] for row in rows("llama", "--include", f"{NORM},{ROPE}")} == {NORM, ROPE}
    assert {
        row["op"] for row in rows("llama", "--include", "rope,swiglu", "--exclude", "rope")
    } == {"swiglu"}
    found = rows("--models", "llama,gpt_neox", "--include", "rope", "--backend", "torch")
    assert {(row["architecture"], row["kernel"]) for row in found} == {
        ("llama", ROPE),
        ("gpt_neox", ROPE),
    }
    monkeypatch.delenv("HF_KERNEL_PATCH")
    (tmp_path / "train.yaml").write_text(f"kernel_config: {{include_kernels: {NORM}}}\n")
    assert {row["kernel"] for row in rows("llama", "--config", tmp_path / "train.yaml")} == {NORM}
    assert not hf_kernel_patch.status().rows


def test_status_says_that_a_choice_of_models_leaves_a_model_out() -> None:
    text = invoke("status", "llama", "--models", "qwen3").stdout
    assert text == "nothing patched: --models leaves llama out\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--include", "rms_nrm"), "did you mean 'rms_norm'"),
        (("--models", "lama"), "did you mean 'llama'"),
        (("--backend", "trition"), "did you mean 'triton'"),
        (("--options", "rope.nope=1", "--include", "rope"), "unknown option 'nope'"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_status_tells_a_wrong_choice(arguments: tuple[str, ...], message: str) -> None:
    result = invoke("status", "llama", *arguments)
    assert result.exit_code in (1, 2) and result.stdout == ""
    assert message in result.stderr


def test_an_unknown_variable_is_named_by_commands_and_at_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH_MODLES", "llama")
    said = "unknown variable HF_KERNEL_PATCH_MODLES; did you mean HF_KERNEL_PATCH_MODELS"
    result = invoke("list")
    assert result.exit_code == 0 and result.stderr.startswith(f"hf-kernel-patch: {said}")
    program = "\n\nimport hf_kernel_patch\n"
    done = run_python(program, HF_KERNEL_PATCH_MODLES="llama")
    assert done.returncode == 0
    assert f"<string>:3: KernelPatchWarning: {said}" in done.stderr


def test_list_imports_no_torch_that_is_built_for_cpus_alone() -> None:
    import torch

    if torch.version.cuda or torch.version.hip or sys.platform not in ("linux", "win32"):
        pytest.skip("this torch may have an accelerator")
    shown = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    done = run_python(f"{shown}{COMMAND.format(repr('list'))}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert f"\n{NORM} " in done.stdout


@pytest.mark.parametrize(
    ("version", "driver", "none"),
    [
        ("cuda = None\nhip = None\nxpu = None\n", True, True),
        ("cuda: str | None = None\nhip = None\n", True, True),
        ("cuda = '12.8'\nhip = None\n", False, True),
        ("cuda = '12.8'\nhip = None\n", True, False),
        ("cuda = None\nhip = '6.4'\n", False, False),
        ("cuda = None\nxpu = '2025'\n", False, False),
        ("nothing = 1\n", False, False),
        ("no Python", False, False),
    ],
)
def test_torch_s_files_say_whether_there_can_be_an_accelerator(
    version: str, driver: bool, none: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform not in ("linux", "win32"):
        pytest.skip("another platform has accelerators of its own")
    (tmp_path / "__init__.py").touch()
    (tmp_path / "version.py").write_text(version)

    class Spec:
        origin = os.fspath(tmp_path / "__init__.py")

    monkeypatch.setattr(devices, "find_spec", lambda name: Spec if name == "torch" else None)
    monkeypatch.setattr(devices, "entry_points", lambda group: ())
    monkeypatch.setattr(devices, "_has_cuda_driver", lambda: driver)
    assert not devices._has_no_accelerator()  # torch is imported here: it says so itself
    monkeypatch.delitem(sys.modules, "torch")
    assert devices._has_no_accelerator() is none
    monkeypatch.setattr(devices, "entry_points", lambda group: ("another backend",))
    assert not devices._has_no_accelerator()


def test_what_was_found_in_families_is_looked_for_anew_where_their_code_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "modeling_mine.py"
    file.touch()
    monkeypatch.setattr(models, "families", lambda: {"mine": ("transformers.models.mine",)})
    monkeypatch.setattr(models, "file_of", lambda module: file)
    before = families._key()
    assert families._key() == before
    os.utime(file, ns=(1, 1))
    assert families._key() != before
