"""``hf-kernel-patch bisect``: a program is run again and again, with ever fewer sites patched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import typer

from hf_kernel_patch import settings
from hf_kernel_patch.bisecting import MOST_RUNS, Bisection, Search
from hf_kernel_patch.cli.autopatch import DIRECTORY
from hf_kernel_patch.patching.bisection import Trial, patched_in

#: Lines of a program's output that are shown where it fails.
SHOWN = 15


def without_python(arguments: list[str]) -> list[str]:
    """The arguments of Python, where the command of Python itself was given before them."""
    name = Path(arguments[0]).name.removesuffix(".exe")
    if name.rstrip("0123456789.") == "python" and len(arguments) > 1:
        return arguments[1:]
    return arguments


def bisect_program(
    arguments: list[str],
    options: Mapping[str, str],
    max_runs: int = MOST_RUNS,
    timeout: float | None = None,
    show_output: bool = False,
) -> Bisection:
    """Bisect this Python run with ``arguments``; Ctrl-C gives what is known by then.

    ``options`` are as ``autopatch.execute`` takes them.
    """
    with (
        _terminated_as_interrupted(),
        tempfile.TemporaryDirectory(prefix="hf-kernel-patch-") as folder,
    ):
        program = _Program(arguments, options, Path(folder), timeout, show_output)
        search = Search(program.run, max_runs, typer.echo)
        try:
            return search.result()
        except KeyboardInterrupt:
            typer.echo(f"interrupted. {search.so_far()}", err=True)
            raise typer.Exit(130) from None


class _Program:
    """A program that a bisection runs, and the folder by which its processes know what to do."""

    def __init__(
        self,
        arguments: list[str],
        options: Mapping[str, str],
        folder: Path,
        timeout: float | None,
        show_output: bool,
    ):
        self._command = [sys.executable, *arguments]
        self._folder, self._timeout = folder, timeout
        self._show_output = show_output
        directory = str(folder)
        self._patched = settings.bisected_environment(DIRECTORY, options, directory)
        self._unpatched = settings.unpatched_environment()

    def run(self, trial: Trial) -> tuple[bool, list[str]]:
        """Whether the program ends with exit status 0, and which sites it has patched."""
        trial.write(self._folder)
        bare = trial.only == frozenset()
        with tempfile.TemporaryFile() as output:
            code = self._wait(self._unpatched if bare else self._patched, output)
            if code != 0 and (bare or trial == Trial()) and not self._show_output:
                self._tell(code, output)
        return code == 0, patched_in(self._folder)

    def _wait(self, environment: Mapping[str, str], output: IO[bytes]) -> int | None:
        """The exit status, or None where it took too long."""
        kept: Any = {} if self._show_output else {"stdout": output, "stderr": subprocess.STDOUT}
        if sys.platform != "win32":
            kept["start_new_session"] = True  # so that its children can be stopped with it
        process = subprocess.Popen(self._command, env=environment, stdin=subprocess.DEVNULL, **kept)
        try:
            return process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process)

    def _tell(self, code: int | None, output: IO[bytes]) -> None:
        """The last lines of the output of a run that went wrong."""
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
        ended = f"took more than {self._timeout:g} s" if code is None else f"ended with {code}"
        typer.echo(f"the program {ended}:")
        for line in lines[-SHOWN:]:
            typer.echo(f"  | {line}")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C is, so that nothing is left running and no folder is left."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a program, and what it has started and left running."""
    if sys.platform == "win32":
        process.kill()
    else:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except (ProcessLookupError, PermissionError):  # nobody is left
                break
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue
    process.wait()
