"""``hf-kernel-patch bisect``: a failing program is run until it is known why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, invoke

#: Of a user's own, without transformers, whose import takes long.
LAYERS = """
import torch
from torch import nn

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

class MLP(nn.Module):
    def forward(self, gate, up):
        return nn.functional.silu(gate) * up
"""
WRONG = """
import sys
from hf_kernel_patch import (
    Architecture, BaseKernel, patch_transformers, register_kernel, register_model
)

def swiglu(gate, up, activation):
    raise ZeroDivisionError("the kernel is wrong")

@register_kernel
class Wrong(BaseKernel):
    kernel_id, op, function = "wrong_swiglu", "swiglu", staticmethod(swiglu)

rows = {"MLP.forward": "gated_product", "Norm.forward": "rms_norm.llama"}
register_model(Architecture("own", rows, module="own_layers"))
patch_transformers("wrong_swiglu,torch_fused_rmsnorm", models="own", strict=True)
import own_layers
given = own_layers.torch.ones(1, 1, 4)
own_layers.MLP()(own_layers.Norm()(given), given)
assert sys.argv[1:] == ["--include", "x"]
"""


def write(folder: Path, text: str) -> Path:
    script = folder / "script.py"
    script.write_text(text)
    return script


def test_the_site_is_named_that_makes_a_program_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    (tmp_path / "own_layers.py").write_text(LAYERS)
    script = write(tmp_path, WRONG)
    result = invoke("bisect", "--include", "none", "--", "python", script, "--include", "x")
    assert result.exit_code == 0, result.output
    assert "run 1, nothing patched: right" in result.stdout
    assert "| ZeroDivisionError: the kernel is wrong" in result.stdout
    assert "run 2, everything patched (2 sites): wrong" in result.stdout
    assert result.stdout.endswith(
        "This site changes the result:\n  own_layers.MLP.forward\nLeave it to the original by\n"
        '  exclude="own_layers.MLP.forward"\nWith it the result was right. '
        f"({result.stdout.count('run ')} runs)\n"
    )


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("print('line', 3); raise SystemExit(3)", 1, "wrong without any patch"),
        ("pass", 0, "Nothing to find: no site was patched."),
        (
            "import os; raise SystemExit('HF_KERNEL_PATCH_DISABLE' not in os.environ)",
            1,
            "although no site is patched",
        ),
    ],
)
def test_what_is_no_kernel_s_fault_is_told(
    program: str, code: int, message: str, tmp_path: Path
) -> None:
    result = invoke("bisect", write(tmp_path, program))
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert ("  | line 3" in result.stdout) is ("line" in program)


def test_a_run_that_takes_too_long_is_stopped_with_its_children_and_counts_as_wrong(
    tmp_path: Path,
) -> None:
    child = "import time; time.sleep(600)"
    program = (
        "import os, subprocess, sys, time\n"
        "if 'HF_KERNEL_PATCH_DISABLE' in os.environ: sys.exit()\n"
        f"process = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(process.pid))\n"
        "time.sleep(600)"
    )
    result = invoke("bisect", "--timeout", "2", write(tmp_path, program))
    assert result.exit_code == 1
    assert "the program took more than 2 s" in result.stdout
    assert gone(int((tmp_path / "child").read_text()))


def gone(process: int) -> bool:
    """Whether a process ends within some seconds, or is only waited for by nobody."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_from_outside_leaves_nothing_behind(number: int, tmp_path: Path) -> None:
    program = (
        "import os, time\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)"
    )
    main = (
        f"import sys; sys.path[:0] = {[str(ROOT), *sys.path]!r}\n"
        "from hf_kernel_patch.cli.commands import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", main, "bisect", str(write(tmp_path, program))],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search("interrupted. Nothing is known yet", told), told
    assert gone(int((tmp_path / "child").read_text()))
    assert not list(tmp_path.glob("hf-kernel-patch-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.py",), "no such file: absent.py"),
        (("--", "python", "absent.py"), "no such file: absent.py"),
        (("--include", "rms_nrm", __file__), "did you mean 'rms_norm'"),
        (("--max-runs", "1", __file__), "max-runs"),
    ],
)
def test_bisect_refuses_before_anything_starts(arguments: tuple[str, ...], message: str) -> None:
    result = invoke("bisect", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
