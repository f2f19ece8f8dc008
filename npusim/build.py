"""Builds the libraries that torch_npu links to: a host-memory runtime, and stubs for the rest."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("runtime.c")
#: What torch_npu's libraries name as NEEDED and CANN would provide. The first holds every symbol.
RUNTIME, COMPANIONS = (
    "libascendcl.so",
    (
        "libhccl.so",
        "libacl_op_compiler.so",
        "libge_runner.so",
        "libgraph.so",
        "libacl_tdt_channel.so",
    ),
)
_OF_CANN = re.compile(r"(acl|rt[A-Z]|Msprof|Hccl)\w+")
_DEFINED_IN_C = re.compile(r"^[\w ]+?\*?\b((?:acl|rt)\w+)\(", re.MULTILINE)


def preload() -> Path:
    """Builds where needed and loads the libraries, so that ``import torch_npu`` finds them.

    Loaded under their names, they satisfy the NEEDED entries of the wheel without LD_LIBRARY_PATH.
    Returns their folder. Raises CalledProcessError with the compiler's words on its stderr.
    """
    folder = build()
    for name in (RUNTIME, *COMPANIONS):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    return folder


def build() -> Path:
    """The folder of the libraries, built at the first call for this source and this wheel.

    Raises OSError where another user's folder is in the way.
    """
    key = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes())
    key.update(version("torch_npu").encode())
    folder = Path(tempfile.gettempdir()) / f"npusim-{os.getuid()}-{key.hexdigest()[:16]}"
    if not _is_ours(folder):
        with tempfile.TemporaryDirectory(prefix="npusim-") as scratch:
            made = Path(scratch) / "lib"
            made.mkdir()
            _compile(made)
            try:
                made.rename(folder)  # whole or not at all; another process may have been faster
            except OSError:
                if not _is_ours(folder):
                    raise
    return folder


def _is_ours(folder: Path) -> bool:
    return folder.exists() and folder.stat().st_uid == os.getuid()


def _compile(folder: Path) -> None:
    """Writes the runtime, whose unwritten functions return success, and its empty companions."""
    stubs = folder / "stubs.c"
    names = sorted(_undefined_in_the_wheel() - set(_DEFINED_IN_C.findall(SOURCE.read_text())))
    stubs.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in names))
    _link(folder, RUNTIME, str(SOURCE), str(stubs))
    stubs.unlink()
    for name in COMPANIONS:  # linked to the runtime: functions are looked up in either by name
        _link(folder, name, "-Wl,--no-as-needed", str(folder / RUNTIME))


def _link(folder: Path, name: str, *sources: str) -> None:
    flags = ["-O1", "-Wall", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
    _run("gcc", *flags, "-o", str(folder / name), *sources)


def _undefined_in_the_wheel() -> set[str]:
    """The symbols of CANN that the wheel's libraries need when they are loaded."""
    spec = find_spec("torch_npu")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    libraries = ["libtorch_npu.so", "libtensorpipe.so", "libnpu_profiler.so"]
    paths = [package / "lib" / name for name in libraries] + sorted(package.glob("_C.*.so"))
    listed = _run("nm", "-D", "--undefined-only", "--format=posix", *map(str, paths))
    names = {line.split("@")[0].split()[0] for line in listed.splitlines() if line.strip()}
    return {name for name in names if _OF_CANN.fullmatch(name)}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
