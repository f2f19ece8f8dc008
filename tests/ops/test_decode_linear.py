"""The reference of linear layers of few rows is what ``F.linear`` and a gated MLP compute."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.decode_linear import reference
from hf_kernel_patch.ops.swiglu.reference import swiglu
from tests.support.ops.inputs import F32, draw


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24)])
def test_linears(shape: tuple[int, ...]) -> None:
    x = draw(shape, F32, grad=False)
    weights = [draw((n, 24), F32, seed=n, grad=False) for n in (5, 8)]
    biases = [None, draw((8,), F32, seed=3, grad=False)]
    found = reference.linears(x, weights, biases)
    for out, weight, bias in zip(found, weights, biases, strict=True):
        torch.testing.assert_close(out, F.linear(x, weight, bias))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated(activation: str) -> None:
    x, gate, up = (draw(s, grad=False) for s in ((3, 24), (7, 24), (7, 24)))
    found = reference.gated(x, gate, up, activation)
    wanted = swiglu(F.linear(x, gate), F.linear(x, up), activation)
    for out, expected in zip(found, (F.linear(x, gate), F.linear(x, up), wanted), strict=True):
        torch.testing.assert_close(out, expected)
