"""Whether the files that a user names can be used, before anything takes long."""

from __future__ import annotations

from pathlib import Path

from hf_kernel_patch import devices
from hf_kernel_patch.cli.demo import picture
from hf_kernel_patch.errors import KernelPatchError, cut


def check_files(json: Path | None, plot: Path | None, text: Path | None = None) -> None:
    """Raise where ``json`` or ``plot`` cannot be written, or ``text`` cannot be read."""
    if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
        raise FileNotFoundError(f"--json: {cut(str(json))} is not a file in a folder that exists")
    if plot is not None:
        if devices.missing_package("matplotlib"):
            raise KernelPatchError(
                "the picture needs matplotlib: pip install 'hf_kernel_patch[bench]'"
            )
        picture.check(plot)
    if text is not None:
        text.open("rb").close()
