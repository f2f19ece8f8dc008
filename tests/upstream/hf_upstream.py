"""A plugin of pytest for transformers' own tests: gated MLPs that can be served, what became of
each test, and how many calls were served.

HF_UPSTREAM_RESULTS names the file for the outcomes. Whether anything is patched is up to the
variables of hf_kernel_patch, which take effect when it is imported here, before any test.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import pytest

import hf_kernel_patch

_outcomes: dict[str, str] = {}
_reasons: dict[str, str] = {}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The testers' default activation is GELU, where the models that they test have SiLU."""
    for kind in {item.cls for item in items if getattr(item, "cls", None)}:
        if not getattr(kind, "_silu", False):
            kind._silu = True
            kind.setUp = _with_silu(kind.setUp)


def _with_silu(set_up: Any) -> Any:
    def wrapped(self: Any) -> None:
        set_up(self)
        tester = getattr(self, "model_tester", None)
        for one in (tester, getattr(tester, "text_model_tester", None)):
            if getattr(one, "hidden_act", None) == "gelu":
                one.hidden_act = "silu"

    return wrapped


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: Any) -> Any:
    """Calls are counted, except where tests want a graph without breaks: it would be traced."""
    hf_kernel_patch.count_calls("compile" not in item.name)
    yield
    hf_kernel_patch.count_calls(False)


def pytest_runtest_logreport(report: Any) -> None:
    """A test passed that passed in all its phases."""
    name = report.nodeid.rpartition("::")[2]
    if report.when == "call" or report.outcome != "passed":
        _outcomes[name] = report.outcome
        if report.outcome == "failed":
            _reasons[name] = str(report.longrepr).strip().rpartition("\n")[2]


def pytest_sessionfinish() -> None:
    """Write the outcomes."""
    served: Counter[str] = Counter()
    for row in hf_kernel_patch.status():
        served[row.op] += row.served
    with open(os.environ["HF_UPSTREAM_RESULTS"], "w", encoding="utf-8") as file:
        json.dump({"outcomes": _outcomes, "reasons": _reasons, "served": +served}, file)
