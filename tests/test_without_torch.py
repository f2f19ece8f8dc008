"""What works where torch is not installed, which is also what other versions of Python are asked.

The environments ``py312`` and ``py313`` of tox have no torch. Elsewhere it is hidden here.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import hf_kernel_patch
from tests.support.probes import run_python

ROOT = Path(hf_kernel_patch.__file__).parent
HIDDEN = "import sys\nsys.modules['torch'] = None\n"


def printed(program: str) -> str:
    """What a program prints that finds no torch."""
    done = run_python(HIDDEN + program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(*arguments: str, status: int = 0) -> str:
    """What a command prints where there is no torch."""
    program = f"sys.argv = {['hf-kernel-patch', *arguments]}\n"
    program += "from hf_kernel_patch.cli.commands import main\nmain()"
    done = run_python(HIDDEN + program, COLUMNS="200")
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_every_file_compiles_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in ROOT.rglob("*.py"):
            compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_there_is_no_kernel_and_the_report_says_so() -> None:
    program = (
        "import hf_kernel_patch as h\n"
        "print(h.patch_transformers())\n"
        "print(h.get_available_kernels(), h.get_default_kernels())\n"
        "with h.patched():\n"
        "    pass\n"
        "h.unpatch()\n"
        "try:\n"
        "    h.patch_transformers('torch_fused_rmsnorm')\n"
        "except h.KernelUnavailableError as error:\n"
        "    print(error)"
    )
    assert printed(program).splitlines() == [
        "nothing patched: torch is not installed",
        "[] []",
        "kernel 'torch_fused_rmsnorm' cannot run here: needs the package torch",
    ]


def test_kernels_are_listed_with_what_is_missing() -> None:
    lines = [line.split() for line in command("list").splitlines()]
    told = {line[0]: " ".join(line[1:]) for line in lines if line}
    assert told["torch_fused_rmsnorm"].endswith("needs the package torch")
    assert told["npu_fused_rmsnorm"].endswith("needs the package torch")


def test_every_command_has_help() -> None:
    program = (
        "from typer.testing import CliRunner\n"
        "from hf_kernel_patch.cli.commands import app\n"
        "for name in ('list', 'table', 'status', 'run', 'diff', 'doctor', 'demo'):\n"
        "    done = CliRunner().invoke(app, [name, '--help'])\n"
        "    print(name, done.exit_code, len(done.stdout) > 200)"
    )
    lines = printed(program).splitlines()
    assert len(lines) == 7
    assert all(line.endswith(" 0 True") for line in lines), lines


def test_a_program_that_needs_no_torch_is_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('ran with', *sys.argv[1:])\nsys.exit(3)\n")
    assert "ran with --x 1" in command("run", str(script), "--x", "1", status=3)


def test_a_folder_of_the_working_directory_is_no_family(tmp_path: Path) -> None:
    """Where transformers is missing, too, there is none at all."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "modeling_mine.py").write_text("")
    program = (
        f"import os; os.chdir({str(tmp_path)!r})\n"
        "sys.modules['transformers'] = None\n"
        "from hf_kernel_patch import models\n"
        "print(models.families())"
    )
    assert printed(program) == "{}\n"
