"""Random numbers of one's own: everybody else's go on as if nothing had been drawn."""

from __future__ import annotations

import random

import numpy as np
import torch

from hf_kernel_patch.workload import seeded


def drawn() -> tuple[float, float, float]:
    """The next number of each generator."""
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_the_same_is_drawn_inside_and_what_would_have_been_afterwards() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    with seeded(5):
        first = drawn()
    after = drawn()
    with seeded(5):
        assert drawn() == first
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    assert drawn() == after
