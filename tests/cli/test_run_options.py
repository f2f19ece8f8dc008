"""What ``hf-kernel-patch run`` hands on to a program, and the report of its end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.programs import program
from tests.support.probes import NORM, ROPE

VARIABLES = """
import json, os
print(json.dumps({k: v for k, v in os.environ.items() if k.startswith("HF_KERNEL_PATCH")}))
"""


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        (
            ("--exclude", "moe", "--options", "linear_cross_entropy.exact=1", "--verbose"),
            {},
            {"": "auto", "_EXCLUDE": "moe", "_OPTIONS": "linear_cross_entropy.exact=1"}
            | {"_LOG": "info"},
        ),
        (
            ("--config", "train.yaml", "--include", "rope"),
            {"HF_KERNEL_PATCH_MODELS": "qwen2"},
            {"": "rope", "_MODELS": "qwen2", "_STRICT": "1", "_EXCLUDE": "moe"},
        ),
        (
            ("--config", "train.yaml"),
            {},
            {"": NORM, "_MODELS": "llama,gemma", "_STRICT": "1", "_EXCLUDE": "moe"},
        ),
    ],
    ids=["options", "config, options and variables", "config"],
)
def test_run_hands_on_what_was_asked_for(
    arguments: tuple[str, ...], variables: dict[str, str], told: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(VARIABLES)
    (tmp_path / "train.yaml").write_text(
        f"learning_rate: 1.0e-4\nkernel_config:\n  include_kernels: {NORM}\n"
        "  models: [llama, gemma]\n  strict: true\n  exclude: moe\n"
    )
    done = program("run", *arguments, "script.py", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    wanted = {f"HF_KERNEL_PATCH{name}": text for name, text in told.items()}
    assert json.loads(done.stdout) == wanted
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "variables", "why"),
    [
        (("--config", "train.yaml"), {}, "train.yaml has no kernel_config"),
        (("--include", "0"), {}, "no kernel is chosen"),
        ((), {"HF_KERNEL_PATCH_DISABLE": "1"}, "HF_KERNEL_PATCH_DISABLE is set"),
    ],
    ids=["config", "option", "variable"],
)
def test_run_says_that_nothing_is_patched(
    arguments: tuple[str, ...], variables: dict[str, str], why: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text("print('runs')")
    (tmp_path / "train.yaml").write_text("learning_rate: 1.0e-4\n")
    done = program("run", *arguments, "script.py", cwd=tmp_path, **variables)
    assert (done.returncode, done.stdout) == (0, "runs\n")
    assert done.stderr == f"hf-kernel-patch: nothing is patched: {why}\n"


# The report: of one process that patches, serves, starts others and fails.

CHILDREN = """
import subprocess, sys
if __name__ == "__main__":
    light = [sys.executable, "-c", "print('no transformers')"]
    other = [sys.executable, "-c", "import transformers"]
    subprocess.run(light, check=True)
    subprocess.run(other, check=True)
"""
SERVING = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import hf_kernel_patch
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(config)
model(torch.arange(4)[None])
hf_kernel_patch.unpatch()
model(torch.arange(4)[None])
raise KeyError("a failure of the program")
"""


def report(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_the_report_has_the_counts_also_where_the_program_fails(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(CHILDREN + SERVING)
    (tmp_path / "report.json").write_text("of an earlier run")
    options = ("--include", f"{NORM},{ROPE}", "--models", "llama", "--report", "report.json")
    done = program("run", *options, "script.py", "argument", cwd=tmp_path)
    assert done.returncode == 1 and "KeyError: 'a failure of the program'" in done.stderr
    assert "hf-kernel-patch" not in done.stderr
    found = report(tmp_path / "report.json")
    served = {row["kernel"]: row["served"] for row in found["rows"]}
    assert served == {NORM: 3, ROPE: 1}
    assert found["counts"] == {"served": 4, "fallbacks": {}}
    assert found["program"] == ["script.py", "argument"] and found["rank"] is None
    assert found["error"].startswith("KeyError: ")
    (other,) = tmp_path.glob("report.pid*.json")
    assert report(other)["rows"] == []
    assert report(other)["summary"] == "nothing patched: no model of transformers was imported"
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "report.json",
        other.name,
        "script.py",
    ]


def test_a_program_without_transformers_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys; sys.exit(3)")
    done = program("run", "--report", str(tmp_path / "r.json"), "script.py", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    found = report(tmp_path / "r.json")
    assert found["summary"] == "nothing patched: the program has not imported transformers"
    assert found["counts"] == {"served": 0, "fallbacks": {}} and found["error"] is None


@pytest.fixture
def light_transformers(tmp_path: Path) -> None:
    """A package of that name beside the script: its import is what counts here, and fast."""
    (tmp_path / "transformers" / "models").mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").touch()


RANKS = """
import os, subprocess, sys
for rank in "01":
    job = [sys.executable, "-c", "import transformers, subprocess, sys; "
           "subprocess.run([sys.executable, '-c', 'import transformers'])"]
    subprocess.run(job, env={**os.environ, "RANK": rank}, check=True)
if hasattr(os, "fork") and not os.fork():
    sys.exit(0)
"""


def test_every_process_of_a_job_writes_a_report_of_its_own(
    light_transformers: None, tmp_path: Path
) -> None:
    (tmp_path / "launcher.py").write_text(RANKS)
    done = program("run", "--report", "r.json", "launcher.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = sorted(one.name for one in tmp_path.glob("r.*"))
    assert [name for name in names if "pid" not in name] == [
        "r.json",
        "r.rank0.json",
        "r.rank1.json",
    ]
    assert len([name for name in names if "pid" in name]) == 2
    assert [report(tmp_path / f"r.rank{rank}.json")["rank"] for rank in "01"] == ["0", "1"]


def test_a_job_whose_launcher_is_not_patched_writes_by_rank(
    light_transformers: None, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text("import transformers")
    for rank in "01":
        done = program("run", "--report", "r.json", "script.py", cwd=tmp_path, RANK=rank)
        assert done.returncode == 0, done.stderr
    assert sorted(one.name for one in tmp_path.glob("r.*")) == ["r.rank0.json", "r.rank1.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_report_that_cannot_be_written_is_told_and_changes_no_exit_status(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "script.py").write_text(f"import os; os.rmdir({str(folder)!r})")
    done = program("run", "--report", str(folder / "r.json"), "script.py", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("hf-kernel-patch: no report is written: ")
