"""Some random steps, the same ones at every run; ``python -m tests.random_steps`` takes more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

#: About two minutes on one core.
SEED, STEPS = 7, 1440


@pytest.mark.random_steps
def test_random_steps_break_no_guarantee() -> None:
    """In a process of their own, so that what they find depends on nothing that ran before."""
    command = [sys.executable, "-m", "tests.random_steps"]
    done = subprocess.run(
        [*command, "--seed", str(SEED), "--steps", str(STEPS)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    told = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, told
    found = re.search(r"seed \d+: (\d+) steps, (\d+) results compared, ([\d,]+) objects", told)
    assert found, told
    steps, results, objects = (int(number.replace(",", "")) for number in found.groups())
    assert steps > STEPS / 2
    assert results > STEPS / 3
    assert objects > 100_000
