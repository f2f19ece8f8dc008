"""What a patch makes of a model's code, found by patching it for a moment."""

from __future__ import annotations

import warnings

from hf_kernel_patch import registry
from hf_kernel_patch.cli.preview import architecture_of, import_modelling
from hf_kernel_patch.errors import KernelPatchWarning, shown
from hf_kernel_patch.patching.block import patched
from hf_kernel_patch.patching.report import Outcome, Row


def differences(model: str, site: str = "", include: str = "") -> list[tuple[Row, str]]:
    """(row, unified diff or "") of every site of a model whose name contains ``site``.

    Args:
        model: a directory with a model's config.json, or an architecture.
        include: kernel ids and ops, separated by commas; by default every op.

    Raises:
        ValueError: no such architecture, kernel, op or site.
        FileNotFoundError: the directory holds no config.json.
    """
    name = architecture_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelPatchWarning)  # the rows say the same
        with patched(include or sorted(registry.ops()), models=name, strict=False) as report:
            broken = import_modelling([name])
            for row in report.pending:
                row.outcome, row.reason = Outcome.SKIPPED, broken[row.architecture]
            found = [(row, row.diff) for row in report if row.site and site in row.site]
    if not found:
        raise ValueError(f"{name} has no site with {shown(site)} in its name")
    return found
