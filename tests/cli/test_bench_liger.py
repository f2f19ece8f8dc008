"""Liger beside the others: in a process of its own, which a package of its name patches here."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

import hf_kernel_patch
from hf_kernel_patch.cli import bench_liger
from tests.cli.commands import invoke
from tests.support.probes import NORM, changed, places

#: Patches the class of the norms, as Liger does, and tells the process that it runs in.
PATCHING = """
import os
from pathlib import Path


def apply_liger_kernel_to_llama():
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaRMSNorm.forward

    def forward(self, hidden_states):
        Path(__file__).with_name(str(os.getpid())).touch()
        {what}
        return original(self, hidden_states)

    modeling_llama.LlamaRMSNorm.forward = forward
"""
ARGUMENTS = (
    "bench", "llama", "--device", "cpu", "--layers", "1", "--batch", "1", "--length", "8",
    "--rounds", "2", "--decode", "1", "--no-ops", "--include", NORM, "--models", "llama", "--liger",
)  # fmt: skip


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a package of Liger's name, whose norms do what they are told."""

    def write(what: str = "pass") -> Path:
        folder = tmp_path / "liger_kernel" / "transformers"
        folder.mkdir(parents=True)
        for one in (folder.parent, folder):
            (one / "__init__.py").touch()
        (folder / "monkey_patch.py").write_text(PATCHING.replace("{what}", what))
        monkeypatch.syspath_prepend(str(tmp_path))
        return folder

    yield write
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]
    bench_liger.devices._import_error.cache_clear()


def test_it_takes_turns_in_its_own_process_and_leaves_nothing(package: Any) -> None:
    folder, originals = package(), places()
    result = invoke(*ARGUMENTS)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("  liger ")]
    assert len(rows) == 2 and all(float(row[1]) > 0 for row in rows)
    patched = [one.name for one in folder.iterdir() if one.name.isdigit()]
    assert len(patched) == 1
    assert int(patched[0]) not in [one.pid for one in multiprocessing.active_children()]
    assert not changed(originals) and not hf_kernel_patch.status().rows


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("raise ValueError('odd')", "ValueError: odd"),
        ("os._exit(3)", "its process ended unexpectedly"),
    ],
)
def test_its_failure_is_told_and_the_others_go_on(package: Any, what: str, words: str) -> None:
    package(what)
    result = invoke(*ARGUMENTS)
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("  liger ")]
    assert len(rows) == 2 and all(line.endswith(words) for line in rows)
    assert result.stdout.count("  patched ") == 2


def test_what_is_missing_is_told(package: Any) -> None:
    if bench_liger.devices.missing_package("liger_kernel"):
        result = invoke(*ARGUMENTS)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "--liger: liger_kernel is not installed" in result.stderr
    package()
    result = invoke(*("gpt2" if one == "llama" else one for one in ARGUMENTS))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "--liger: liger_kernel has nothing for gpt2" in result.stderr
