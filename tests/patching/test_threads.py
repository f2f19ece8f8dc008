"""Threads and forks: first use by many at once, and a child that takes its patches back."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from hf_kernel_patch import registry
from hf_kernel_patch.kernels import BaseKernel, register_kernel
from hf_kernel_patch.patching.ledger import Ledger
from hf_kernel_patch.registry import Scan
from tests.support.probes import run_python, watched_kernel

#: Runs ``ask()`` in many threads at the same moment and prints how many answers there are.
TOGETHER = """
import sys, threading
sys.setswitchinterval(1e-6)
import hf_kernel_patch as h
from hf_kernel_patch import models, registry
{program}
answers, start = [], threading.Barrier(16)
def one():
    start.wait()
    try:
        answers.append(ask())
    except BaseException as error:
        answers.append(repr(error))
threads = [threading.Thread(target=one) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(answers) == 16
assert len(set(map(str, answers))) == 1, answers
print(answers[0])
"""
ASKED = {
    "default-kernels": ("h.get_default_kernels()", "torch_fused_rmsnorm"),
    "available-kernels": ("sorted(h.get_available_kernels())", "torch_fused_linear_cross_entropy"),
    "a-kernel": ("registry.select(('rms_norm',), backend='torch')['rms_norm'].kernel_id", "torch_"),
    "architectures": ("sorted(models.architectures())", "'smollm3'"),
    "a-model": ("models.select(('smollm3',)).tables[0].name", "smollm3"),
    "patching": (
        "len(h.patch_transformers('rms_norm', models='smollm3', backend='torch').rows)",
        "1",
    ),
    "the-callback": ("h.KernelPatchCallback, id(h.KernelPatchCallback)", "KernelPatchCallback"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_first_use_by_many_threads_gives_all_the_same(asked: str) -> None:
    expression, expected = ASKED[asked]
    done = run_python(TOGETHER.format(program=f"def ask():\n    return {expression}"))
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout and "Error" not in done.stdout


def test_a_kernel_is_registered_while_others_are_looked_at() -> None:
    made: list[str] = []

    def check() -> None:
        """Available, but another thread registers a kernel before that is known."""
        made.append(f"late_{len(made)}")
        late = type("Late", (BaseKernel,), {"kernel_id": made[-1]})
        thread = threading.Thread(target=register_kernel, args=(late,))
        thread.start()
        thread.join(60)

    try:
        with watched_kernel(check_device=check, default_on=("cpu", "cuda"), backend="own"):
            assert "own_rmsnorm" in registry.available()
            assert "rope" in registry.defaults()
            assert registry.select(("rms_norm",), backend="own")
    finally:
        for kernel_id in made:
            registry.kernels().pop(kernel_id, None)
    assert len(made) >= 3


def test_a_scan_is_run_once_and_waited_for() -> None:
    runs: list[int] = []
    going, go_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    def scan() -> None:
        runs.append(1)
        found()  # as the modules that are imported do
        going.set()
        assert go_on.wait(60)

    found = Scan(scan)
    first = threading.Thread(target=found)
    first.start()
    assert going.wait(60)

    def wait() -> None:
        found()
        seen.append(go_on.is_set())

    second = threading.Thread(target=wait)
    second.start()
    second.join(0.2)
    assert not seen
    go_on.set()
    first.join(60)
    second.join(60)
    assert (seen, runs) == ([True], [1])


def test_a_scan_that_fails_fails_again() -> None:
    def scan() -> None:
        raise ImportError("no such op")

    found = Scan(scan)
    for _ in range(2):
        with pytest.raises(ImportError, match="no such op"):
            found()


#: Forks as ``when`` says, and has the child take everything back; it is killed if it hangs.
FORK = """
import os, signal, sys, threading
import hf_kernel_patch as h
from hf_kernel_patch import registry
from hf_kernel_patch.patching.ledger import ledger
h.patch_transformers('rms_norm', models='llama', backend='torch')
from transformers.models.llama.modeling_llama import LlamaRMSNorm
patched = LlamaRMSNorm.forward
def fork():
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        h.unpatch()
        restored = LlamaRMSNorm.forward is not patched
        h.patch_transformers('rms_norm', models='llama', backend='torch')
        os._exit(0 if restored and h.status().rows else 3)
    return os.waitpid(child, 0)[1]
{when}
assert LlamaRMSNorm.forward is patched
h.unpatch()
assert LlamaRMSNorm.forward is not patched
"""
HELD = """
held, end = threading.Event(), threading.Event()
def hold():
    with {lock}:
        held.set()
        end.wait({seconds})
thread = threading.Thread(target=hold)
thread.start()
held.wait()
assert (status := fork()) == 0, status
end.set()
thread.join()
"""
FORKS = {
    "another-thread-holds-the-lock": HELD.format(lock="ledger.lock", seconds=60),
    "another-thread-is-about-to-end": HELD.format(lock="ledger.lock", seconds=0.3),
    "this-thread-holds-the-lock": "with ledger.lock:\n    assert (status := fork()) == 0, status",
    "another-thread-scans": HELD.format(lock="registry._scan._lock", seconds=1),
    "twice": "assert fork() == 0 and fork() == 0",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.parametrize("when", FORKS)
def test_a_forked_child_can_unpatch(when: str) -> None:
    done = run_python(FORK.format(when=FORKS[when]))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_fork_waits_for_the_change_that_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "patience", 30.0)
    ledger = Ledger()
    held, steps = threading.Event(), []  # type: ignore[var-annotated]

    def change() -> None:
        with ledger.lock:
            held.set()
            threading.Event().wait(0.3)
            steps.append("change")

    thread: Any = threading.Thread(target=change)
    thread.start()
    assert held.wait(60)
    ledger.before_fork()
    steps.append("fork")
    ledger.after_fork(in_child=False)
    thread.join(60)
    assert steps == ["change", "fork"]
    other = threading.Thread(target=lambda: steps.append(ledger.lock.acquire(timeout=10)))
    other.start()
    other.join(60)
    assert steps[-1] is True  # the fork's hold on it has ended
