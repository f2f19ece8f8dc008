"""docs/ascend.md: its example prints what it says, its tables are those of the code."""

from __future__ import annotations

import re

import pytest
import torch

from hf_kernel_patch import registry
from tests.npu.device import KERNELS
from tests.support.pages import PAGES, blocks, table
from tests.support.tiny import TRANSFORMERS_5


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has a list of experts")
def test_the_example_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,), (printed,) = blocks("ascend.md", "python"), blocks("ascend.md", "text")
    exec(example, {})
    assert capsys.readouterr().out == printed


def test_every_kernel_for_npu_is_in_the_table_and_under_test() -> None:
    listed = [kernel.strip("`") for kernel, *_ in table("ascend.md", "kernel")]
    here = {name for name, kernel in registry.kernels().items() if kernel.device == "npu"}
    assert set(listed) == here == set(KERNELS.values())
    defaults = [name for name in listed if registry.kernels()[name].default_on]
    assert defaults == listed[:4]


def test_every_operator_that_the_page_names_is_in_the_wheel() -> None:
    named = set(re.findall(r"`(npu_\w+)`", PAGES["ascend.md"])) - registry.kernels().keys()
    assert len(named) > 15
    assert {name for name in named if not hasattr(torch.ops.npu, name)} == set()
