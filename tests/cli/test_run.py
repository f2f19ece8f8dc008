"""``hf-kernel-patch run``: programs that are patched without a change."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_kernel_patch import registry
from hf_kernel_patch.kernels import BaseKernel, register_kernel
from tests.cli.commands import invoke
from tests.cli.programs import program


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("absent.py",), 2, "no such file: absent.py"),
        (("python3",), 2, "for the command of that name write /"),
        (("-m",), 2, "-m needs the name of a module"),
        (("--inclde", "rope", __file__), 2, "no such option: --inclde"),
        (("--include", "rms_nrm", __file__), 2, "did you mean 'rms_norm'"),
        (("--models", "lama", __file__), 2, "did you mean 'llama'"),
        (("--backend", "trition", __file__), 2, "did you mean 'triton'"),
        (("--include", "auto,rope", __file__), 2, "'auto' stands alone"),
        (("--include", "llama", __file__), 2, "write models='llama'"),
        (("--exclude", "rop", __file__), 2, "did you mean 'rope'"),
        (("--options", "rope.nope=1", __file__), 2, "unknown option 'nope' in options of rope"),
        (("--options", "rop.nope=1", __file__), 2, "did you mean 'rope'"),
        (("--config", "nowhere.yaml", __file__), 1, "nowhere.yaml"),
        (("--report", "no/such/folder.json", __file__), 1, "is not a file in a folder that"),
        (("--report", ".", __file__), 1, "is not a file in a folder that"),
    ],
)
def test_run_refuses_before_anything_starts(
    arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = invoke("run", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


def test_run_names_the_kernel_that_cannot_run_here() -> None:
    members = {"kernel_id": "needy", "op": "rms_norm", "requires": ("no_such_package",)}
    register_kernel(type("Needy", (BaseKernel,), members))
    try:
        result = invoke("run", "--include", "needy", __file__)
        assert result.exit_code == 1
        assert "'needy' cannot run here: needs the package no_such_package" in result.stderr
    finally:
        del registry.kernels()["needy"]


SCRIPT = """
import json, multiprocessing, subprocess, sys
import transformers

def patched():
    ours = sys.modules.get("hf_kernel_patch")
    return ours and [row.kernel for row in ours.status()]

def tell(queue):
    queue.put(patched())

if __name__ == "__main__" and sys.argv[1:] == ["child"]:
    print(json.dumps(patched()))
elif __name__ == "__main__":
    from transformers.models.llama import modeling_llama
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=tell, args=(queue,))
    process.start()
    child = subprocess.run([sys.executable, __file__, "child"], capture_output=True, text=True)
    print(json.dumps({
        "argv": sys.argv[1:],
        "here": hasattr(modeling_llama.LlamaRMSNorm.forward, "__hf_kernel_patch__"),
        "there": hasattr(modeling_llama.LlamaMLP.forward, "__hf_kernel_patch__"),
        "path": sys.path[0],
        "child": json.loads(child.stdout),
        "spawned": queue.get(),
    }))
    process.join()
    sys.exit(7)
"""


def test_run_patches_an_unmodified_script_and_its_children(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given = ["--include", "x", "--", "-m", "--help", "", "a b"]
    options = ("--include", "torch_fused_rmsnorm", "--models=llama", "--strict")
    done = program("run", *options, str(script), *given, cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout) == {
        "argv": given,
        "here": True,
        "there": False,
        "path": str(tmp_path),
        "child": ["torch_fused_rmsnorm"],
        "spawned": ["torch_fused_rmsnorm"],
    }


MODULE = """
import os, signal, sys
import sitecustomize
told = {name: os.environ.get(name) for name in ("HF_KERNEL_PATCH", "HF_KERNEL_PATCH_BACKEND")}
print(sys.argv[1:], told, sitecustomize.place, "transformers" in sys.modules, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("options", "variables", "told"),
    [
        ((), {}, {"HF_KERNEL_PATCH": "auto", "HF_KERNEL_PATCH_BACKEND": None}),
        (
            ("--backend", "torch"),
            {"HF_KERNEL_PATCH": "rope"},
            {"HF_KERNEL_PATCH": "rope", "HF_KERNEL_PATCH_BACKEND": "torch"},
        ),
    ],
    ids=["by default", "with options and variables"],
)
def test_run_takes_a_module_passes_the_signal_on_and_runs_a_hidden_sitecustomize(
    options: tuple[str, ...], variables: dict[str, str], told: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "told.py").write_text(MODULE)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("place = 'further on'")
    variables = {"PYTHONPATH": str(tmp_path / "site"), **variables}
    done = program("run", *options, "-m", "told", "--strict", "-x", cwd=tmp_path, **variables)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == f"{['--strict', '-x']} {told} further on False\n"
