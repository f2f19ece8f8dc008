"""Whose experts run, as transformers and the report say it."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from packaging.version import Version

#: From here on transformers asks its interface which names there are.
TAKES_NAMES = Version(transformers.__version__) >= Version("5.7")
takes_names = pytest.mark.skipif(not TAKES_NAMES, reason="transformers takes no other names")
OURS = "hf_kernel_patch"


def experts_row(report: Any) -> Any:
    return next(row for row in report if row.site.endswith("Experts.forward"))


def asked_for(model: Any) -> str:
    return str(model.config._experts_implementation)
