"""Two processes of a distributed job on the CPU, by gloo: the programs beside this file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_kernel_patch

ROOT = Path(hf_kernel_patch.__file__).parent.parent
#: The same, whatever the machine's settings. Without "multi_gpu" accelerate wants MPI to start two
#: processes; what they run on is up to the program.
LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]


def launched(command: list[str], result: Path, **variables: str) -> Any:
    """What two processes of a program write, where its command ends with the file's name."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_KERNEL_PATCH")}
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", *command, str(result)],
        env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(result.read_text())


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def test_accelerate_launch_under_the_command_and_with_the_callback(tmp_path: Path) -> None:
    inner = ["accelerate.commands.launch", *LAUNCH, "--main_process_port", free_port()]
    patched = ["hf_kernel_patch", "run", "--include", "rms_norm,linear_cross_entropy"]
    command = [*patched, "-m", *inner, "-m", "tests.distributed.training"]
    found = launched(command, tmp_path / "losses.json")
    assert found["world"] == 2
    assert found["served"] == [4]  # two steps of two
    assert found["outside"] == pytest.approx(found["eager"], rel=1e-5)
    assert found["callback"] == pytest.approx(found["eager"], rel=1e-5)


def test_sharded_heads_are_gathered_or_handed_back(tmp_path: Path) -> None:
    run = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    found = launched([*run, "-m", "tests.distributed.sharded"], tmp_path / "sharded.json")
    served = {name: one["calls"] == [{"served": 1}] for name, one in found.items()}
    fallbacks = {name for name in served if not served[name]}
    assert fallbacks == {"head by itself", "column parallel"}
    assert len(served) == 10
    for name, one in found.items():
        assert one["names"], name
        assert one["loss"] < 1e-6, name
        assert one["gradients"] < 3e-6, name
        assert one["logits"] == 0, name


def test_no_framework_computes_logits_and_who_reads_them_has_the_original_s(tmp_path: Path) -> None:
    run = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    found = launched([*run, "-m", "tests.distributed.outputs"], tmp_path / "outputs.json")
    assert len(found) == 6
    for name, one in found.items():
        assert one["computed"] == 0, name
        assert one["served"] == 2, name
        assert one["same"], name
        assert one["logits"] == 0, name
        assert one["gradients"] < 3e-6, name


def test_processes_measure_as_many_steps_and_then_read_one_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    run = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    first, second = launched(
        [*run, "-m", "tests.distributed.measured"],
        tmp_path / "measured.json",
        HF_KERNEL_PATCH_CACHE=str(cache),
    )
    assert first[0]["steps"] == first[1]["steps"] > 60
    assert all("; measured now)" in text for one in first for text in one["texts"])
    (file,) = cache.iterdir()
    assert second[0] == second[1]
    assert second[0]["steps"] == 0
    assert all(f"; from {file})" in text for text in second[0]["texts"])
