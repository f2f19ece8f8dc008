"""Some random steps, the same ones at every run; ``python -m tests.random_steps`` takes more."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.random_steps.machine import Machine, Options
from tests.random_steps.runner import chunks, plan, run

#: Two minutes and a half on one core.
SEED, STEPS = 7, 1440


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Rounding, and the time that small models take, are those of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.unfreeze()  # which a Machine has frozen


@pytest.mark.random_steps
def test_random_steps_break_no_guarantee(one_thread: None) -> None:
    options = Options()
    machine, done = Machine(options), 0
    for number, planned in enumerate(chunks(plan(SEED, STEPS, options))):
        found = run(machine, planned)
        done += found.done
        if found.violation is not None:
            replay = f"python -m tests.random_steps --seed {SEED} --steps {STEPS} --chunk {number}"
            steps = "\n  ".join(found.log[-30:])
            pytest.fail(f"{found.violation}\nafter\n  {steps}\nagain: {replay}")
    assert done > STEPS / 2
    assert machine.checks > STEPS / 3
    assert machine.snapshot.compared > 100_000
