"""The demo in a process of its own: what ends it early, and what is left then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.commands import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has other signals")


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where the processes put what they keep for a while."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


@pytest.fixture
def demo(tmp_path: Path, temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo that is at work: its two processes have been started."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_kernel_patch", "demo", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while len(runs(process.pid)) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def runs(pid: int) -> list[psutil.Process]:
    """The processes of the two runs."""
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if any("spawn_main" in part for part in child.cmdline())
    ]


def ended(demo: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status of the demo and what it wrote to stderr."""
    _, stderr = demo.communicate(timeout=120)
    return demo.returncode, stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_everything_with_a_word_and_leaves_nothing(
    name: str, demo: subprocess.Popen[str], tmp_path: Path, temporary: Path
) -> None:
    children = psutil.Process(demo.pid).children(recursive=True)
    number = getattr(signal, name)
    if name == "SIGINT":  # a terminal sends it to the whole group
        os.killpg(demo.pid, number)
    else:
        demo.send_signal(number)
    status, stderr = ended(demo)
    words = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM"}[name]
    assert status == 128 + number
    assert f"hf-kernel-patch: stopped by {words}; both processes have ended" in stderr
    assert "Traceback" not in stderr
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert [path.name for path in tmp_path.iterdir()] == [temporary.name]
    # torch keeps a cache of its own there
    assert all(path.name.startswith("torchinductor") for path in temporary.iterdir())


def test_a_process_that_dies_is_named_with_its_status(demo: subprocess.Popen[str]) -> None:
    first, second = runs(demo.pid)
    first.kill()
    status, stderr = ended(demo)
    assert status == 1
    assert "hf-kernel-patch: the process of the run '" in stderr
    assert "ended unexpectedly, with exit status -9" in stderr
    assert "Broken pipe" not in stderr
    assert not psutil.wait_procs([second], timeout=30)[1]
