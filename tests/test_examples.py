"""The programs of examples/ run, and print what they are for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.pages import ROOT
from tests.support.probes import run_python

#: Example -> what it has to print.
EXAMPLES = {
    "accelerate_loop": ["LlamaRMSNorm.forward -> "],
    "generate": ["calls served", "the same tokens"],
    "lora": ["rms_norm: ", "fallbacks: none", "LlamaForCausalLM Linear"],
    "plain_loop": ["rms_norm: ", "calls by", "nothing patched"],
    "trainer": ["5 modules of one model", "'loss'", "nothing patched"],
}
#: All in one process, which imports the frameworks once.
PROGRAM = """
import runpy
for name in {names}:
    print("==", name)
    runpy.run_path(f"{folder}/{{name}}.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """Example -> what it printed."""
    folder = (ROOT / "examples").as_posix()
    done = run_python(PROGRAM.format(names=sorted(EXAMPLES), folder=folder), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^== (\w+)\n", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def test_every_example_is_run() -> None:
    assert {path.stem for path in Path(ROOT, "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_is_for(printed: dict[str, str], name: str) -> None:
    for words in EXAMPLES[name]:
        assert words in printed[name]
    losses = re.search(r"the loss went from ([\d.]+) to ([\d.]+)", printed[name])
    assert losses is None or float(losses.group(2)) < float(losses.group(1))
