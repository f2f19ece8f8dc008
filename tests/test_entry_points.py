"""Kernels of installed packages are found by their entry points, without an import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import ROOT, blocks


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed the package of docs/kernels.md."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (project,) = blocks("kernels.md", "toml")
    (source / "pyproject.toml").write_text(project)
    (source / "package_of_kernels.py").write_text(blocks("kernels.md", "python")[-1])
    offline = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target")
    command = [sys.executable, "-m", "pip", "install", *offline, str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(program: str, *folders: Path, **variables: str) -> Any:
    """A program in a Python that finds the package here and what the folders hold."""
    path = os.pathsep.join([str(ROOT), *map(str, folders), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_variable_and_the_command_find_the_kernels_of_a_package(installed: Path) -> None:
    done = run(
        "import sys\n"
        "sys.argv = ['hf-kernel-patch', 'status', 'llama']\n"
        "from hf_kernel_patch.cli.commands import app\n"
        "app()",
        installed,
        HF_KERNEL_PATCH="package_rmsnorm",
    )
    (shown,) = blocks("kernels.md", "console")
    assert shown.partition("\n")[0].endswith(
        "HF_KERNEL_PATCH=package_rmsnorm hf-kernel-patch status llama"
    )
    assert done.stdout == shown.partition("\n")[2], done.stderr


LISTED = (
    "import sys, hf_kernel_patch as h\n"
    "assert 'package_of_kernels' not in sys.modules and 'torch' not in sys.modules\n"
    "with h.patched('package_rmsnorm', models='llama') as report:\n"
    "    print(*report.rows, len(report), 'torch' in sys.modules)\n"
)


def test_a_patch_may_be_asked_for_before_torch_is_there(installed: Path) -> None:
    done = run(LISTED, installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" 1 False\n") and "package_rmsnorm" in done.stdout
    assert not done.stderr


def entry_points(folder: Path, package: str, **named: str) -> None:
    """The metadata of an installed package with entry points."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in named.items()]
    (info / "entry_points.txt").write_text("\n".join(["[hf_kernel_patch.kernels]", *lines, ""]))


KERNEL = """
from hf_kernel_patch import BaseKernel
class Kernel(BaseKernel):
    kernel_id, op, function = "by_class", "rms_norm", "torch:rms_norm"
"""


def test_a_broken_one_is_named_and_stops_no_other(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "a_raises.py").write_text("raise RuntimeError('no board here')")
    (tmp_path / "a_exits.py").write_text("raise SystemExit(3)")
    (tmp_path / "a_silent.py").write_text("")
    (tmp_path / "a_taken.py").write_text(
        KERNEL.replace("by_class", "torch_fused_rope") + "h = __import__('hf_kernel_patch')\n"
        "h.register_kernel(Kernel)"
    )
    (tmp_path / "a_class.py").write_text(KERNEL + "number = 3")
    names = {
        "raises": ("a_raises", "RuntimeError: no board here"),
        "exits": ("a_exits", "SystemExit: 3"),
        "absent": ("a_module_that_is_not_there", "ModuleNotFoundError: No module named"),
        "silent": ("a_silent", "TypeError: the module a_silent registers no kernel"),
        "taken": ("a_taken", "ValueError: kernel id 'torch_fused_rope' is taken by"),
        "number": ("a_class:number", "TypeError: register_kernel takes a subclass of BaseKernel"),
    }
    entry_points(tmp_path, "broken", **{name: value for name, (value, _) in names.items()})
    entry_points(tmp_path, "good", by_class="a_class:Kernel")
    done = run(
        "import json, hf_kernel_patch as h\n"
        "kernels = h.registry.kernels()\n"
        "assert {'by_class', 'package_rmsnorm', 'torch_fused_rope'} <= {*kernels}\n"
        "with h.patched('by_class', models='llama') as report:\n"
        "    print(report, json.loads(report.to_json())['broken_entry_points'], sep='\\n')\n"
        "try:\n"
        "    h.patch_transformers('boardnorm')\n"
        "except ValueError as error:\n"
        "    print(error)\n",
        tmp_path,
        installed,
    )
    assert done.returncode == 0, done.stderr
    for name, (value, reason) in names.items():
        named = f"the entry point '{name} = {value}' of the package broken"
        assert f"KernelPatchWarning: {named} gives no kernel: {reason}" in done.stderr
        assert f"{named} gives no kernel: {reason}" in done.stdout
    error = done.stdout.splitlines()[-1]
    assert error.startswith("unknown kernel id or op 'boardnorm'")
    assert ". Not loaded: the entry point 'raises = a_raises'" in error
