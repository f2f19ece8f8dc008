"""The two processes of the demo: starting them, asking them, and leaving none behind."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import settings
from hf_kernel_patch.cli.demo import worker
from hf_kernel_patch.errors import KernelPatchError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from types import FrameType

    from hf_kernel_patch.cli.demo.progress import Bar, Lines

#: Seconds that a process gets to end, before it is killed.
PATIENCE = 5.0
#: Seconds between two looks at whether it is time to tell how far things are.
BEAT = 0.5
#: What ends the demo, and what it is called; a closed terminal has no signal on Windows.
_SIGNALS = {
    number: words
    for name, words in {
        "SIGINT": "Ctrl-C",
        "SIGTERM": "SIGTERM",
        "SIGHUP": "SIGHUP, the terminal was closed",
    }.items()
    if (number := getattr(signal, name, None)) is not None
}


class Stopped(BaseException):
    """A signal has ended the demo."""

    def __init__(self, number: int):
        super().__init__(_SIGNALS[signal.Signals(number)])
        self.status = 128 + number


@dataclass
class Workers:
    """The processes by the names of the runs, and what is told of the time that they take."""

    pipes: Mapping[str, Connection]
    processes: Mapping[str, SpawnProcess]
    progress: Lines | Bar

    def send(self, name: str, message: Any) -> None:
        """Send a run its plan, or the name of a method of ``worker.Run``."""
        try:
            self.pipes[name].send(message)
        except OSError:
            raise self._gone(name) from None

    def answer(self, name: str) -> Any:
        """Wait for what a run gives, while progress is told."""
        pipe = self.pipes[name]
        try:
            while not pipe.poll(BEAT):
                self.progress.beat()
            answer = pipe.recv()
        except (EOFError, OSError):
            raise self._gone(name) from None
        if isinstance(answer, str):
            raise KernelPatchError(f"the run {name!r} failed:\n{answer}")
        return answer

    def ask(self, name: str, what: str) -> Any:
        """What a method of ``worker.Run`` gives in one of the runs."""
        self.send(name, what)
        return self.answer(name)

    def ask_all(self, what: str) -> dict[str, Any]:
        """The same of every run, one after the other."""
        return {name: self.ask(name, what) for name in self.pipes}

    def _gone(self, name: str) -> KernelPatchError:
        process = self.processes[name]
        process.join(PATIENCE)
        return KernelPatchError(
            f"the process of the run {name!r} ended unexpectedly, with exit status "
            f"{process.exitcode}; what it printed last, if anything, stands above"
        )


@contextmanager
def started(plans: Mapping[str, worker.Plan], progress: Lines | Bar) -> Iterator[Workers]:
    """A fresh process a plan, all told theirs; all have ended when the context ends."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes: dict[str, SpawnProcess] = {}
    try:
        # Each run patches what its plan says, so nothing that the user's variables say.
        with settings.variables_unset(), _interrupts_ignored():
            for name in plans:
                pipes[name], theirs = context.Pipe()
                process = context.Process(target=worker.main, args=(theirs,), daemon=True)
                processes[name] = process
                process.start()
                theirs.close()
        found = Workers(pipes, processes, progress)
        for name, plan in plans.items():
            found.send(name, plan)
        yield found
    finally:
        for process in processes.values():
            ended(process)


def ended(process: SpawnProcess) -> None:
    """End a process, by force where it does not end by itself."""
    if process.pid is None:  # was never started
        return
    process.terminate()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()


@contextmanager
def stoppable() -> Iterator[None]:
    """Signals raise ``Stopped`` within, so that what is open is closed; later ones are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread can say what a signal does
        return

    # What nohup or a shell has switched off stays off.
    wanted = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        for one in wanted:
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    except Stopped as stopped:
        words = f"stopped by {stopped}; both processes have ended, and nothing is left behind"
        print(f"hf-kernel-patch: {words}", file=sys.stderr)
        raise SystemExit(stopped.status) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What starts within ignores Ctrl-C, also before its first line of Python runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
