"""A failure halfway leaves nothing, and a patch that was there before stays."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import Architecture, KernelPatchWarning, Leaf
from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching import model_patch, records, watching
from hf_kernel_patch.patching.ledger import ledger
from hf_kernel_patch.recognition import composing, known
from hf_kernel_patch.recognition.leaves.norms import LLAMA
from tests.support.probes import (
    LAYERS,
    MOE,
    NORM,
    ROPE,
    changed,
    llama,
    logits,
    places,
    watched_kernel,
)
from tests.support.tiny import largest_error, outputs_and_gradients, tiny_model


@pytest.fixture
def before() -> Iterator[dict[str, Any]]:
    """Llama's places; nothing may be left of a patch that failed."""
    llama()
    objects = places()
    yield objects
    assert changed(objects) == set()
    assert not watching.active
    assert not ledger._stacks
    sites = [site for made in composing._made.values() for site in made.sites.values()]
    assert not any(site.active for site in sites)


def failing_at(nth: int, error: BaseException) -> Callable[..., Any]:
    """``ledger.push`` that raises instead of doing its ``nth`` call."""
    push, calls = ledger.push, 0

    def failing(slot: Any, value: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > nth:
            raise error
        return push(slot, value)

    return failing


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt("injected")])
def test_a_failure_at_any_replacement_leaves_nothing(
    error: BaseException, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = llama().LlamaRMSNorm(8)
    norm.forward = own = MethodType(llama().LlamaRMSNorm.forward, norm)
    with hf_kernel_patch.patched(LAYERS, models="llama"):
        pushes = len(ledger._stacks)
    assert pushes >= 4
    for nth in range(pushes):
        with monkeypatch.context() as patch:
            patch.setattr(ledger, "push", failing_at(nth, error))
            with pytest.raises(type(error), match="injected"):
                hf_kernel_patch.patch_transformers(LAYERS, models="llama")
        assert changed(before) == set()
        assert norm.forward is own
        assert not hf_kernel_patch.status().rows
        assert not ledger._stacks
    with hf_kernel_patch.patched(LAYERS, models="llama", strict=True):
        assert len(changed(before)) == 3
    assert norm.forward is own


def test_a_failure_leaves_the_patches_that_were_there(
    before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_kernel_patch.patch_transformers(NORM, models="llama")
    block = hf_kernel_patch.patched(LAYERS, models="llama")
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "push", failing_at(1, RuntimeError("injected")))
        for enter in (
            block.__enter__,
            lambda: hf_kernel_patch.patch_transformers(LAYERS, models="llama"),
        ):
            with pytest.raises(RuntimeError, match="injected"):
                enter()
            assert changed(before) == {"LlamaRMSNorm.forward"}
            assert [row.op for row in hf_kernel_patch.status()] == ["rms_norm"]
    with block:
        assert len(changed(before)) == 3
    hf_kernel_patch.unpatch()


@pytest.fixture
def table_with_a_bad_adapter() -> Iterator[str]:
    """A table whose second row has a leaf with an adapter that raises, or takes other arguments."""

    def raises(site: Any) -> Any:
        raise RuntimeError("adapter")

    def other_parameters(site: Any) -> Any:
        return lambda self, hidden: hidden

    for name, adapter in (("bad.raises", raises), ("bad.parameters", other_parameters)):
        hf_kernel_patch.register_code(Leaf(name, "rms_norm", {LLAMA: adapter}))
        rows = {"LlamaMLP.forward": "gated_product", "LlamaRMSNorm.forward": name}
        hf_kernel_patch.register_model(Architecture(name, rows, module=llama().__name__))
    yield "bad"
    for name in ("bad.raises", "bad.parameters"):
        del architectures()[name], known()[name]


def test_a_failure_after_a_module_took_its_class_leaves_nothing(
    before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    kinds = [type(module) for module in model.modules()]
    with monkeypatch.context() as patch:
        patch.setattr(model_patch, "source_hash", failing)
        with pytest.raises(RuntimeError, match="injected"):
            hf_kernel_patch.apply_kernel(NORM, model=model)
    assert [type(module) for module in model.modules()] == kinds
    assert not hf_kernel_patch.status().rows


def test_a_failure_while_unpatching_keeps_nothing_else_patched(
    before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_kernel_patch.patch_transformers(LAYERS, models="llama")
    remove, failed = records.Record.remove, []

    def failing_once(self: Any, holder: Any) -> list[str]:
        blocked = remove(self, holder)
        if not failed:
            failed.append(self)
            raise RuntimeError("injected")
        return blocked

    with monkeypatch.context() as patch:
        patch.setattr(records.Record, "remove", failing_once)
        with pytest.raises(RuntimeError, match="injected"):
            hf_kernel_patch.unpatch()
    assert failed
    assert not hf_kernel_patch.status().rows


def failing(*_: Any) -> Any:
    raise RuntimeError("injected")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("raises", RuntimeError, "adapter"), ("parameters", TypeError, "but the original takes")],
)
def test_a_bad_adapter_leaves_nothing(
    kind: str,
    error: type[Exception],
    message: str,
    before: dict[str, Any],
    table_with_a_bad_adapter: str,
) -> None:
    with pytest.raises(error, match=message):
        hf_kernel_patch.patch_transformers(
            ("rms_norm", "swiglu"), models=f"{table_with_a_bad_adapter}.{kind}", backend="torch"
        )
    assert changed(before) == set()


def test_a_kernel_that_cannot_be_loaded_leaves_nothing(before: dict[str, Any]) -> None:
    with (
        watched_kernel("own_swiglu", op="swiglu", function="no_such_package:swiglu"),
        pytest.raises(ModuleNotFoundError, match="no_such_package"),
        hf_kernel_patch.patched((NORM, ROPE, "own_swiglu"), models="llama"),
    ):
        pass


def test_a_warning_that_is_made_an_error_leaves_nothing(before: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelPatchWarning)
        with pytest.raises(KernelPatchWarning, match="found no site"):
            hf_kernel_patch.patch_transformers((NORM, MOE), models="llama")
    assert changed(before) == set()


def test_threads_enter_and_leave_while_another_runs_the_model(before: dict[str, Any]) -> None:
    model = tiny_model("llama")
    eager, step = logits(model), outputs_and_gradients(model)
    barrier, done, errors = threading.Barrier(8, timeout=60), threading.Event(), []
    runs = 0

    def guarded(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            try:
                function(*args)
            except BaseException as error:
                errors.append(error)

        return run

    @guarded
    def run_model() -> None:
        nonlocal runs
        while not done.is_set() or not runs:
            assert torch.equal(logits(model), eager)
            assert largest_error(outputs_and_gradients(model), step) < 3e-6
            runs += 1

    @guarded
    def enter_and_leave(kernel: str) -> None:
        for _ in range(2):
            with hf_kernel_patch.patched(kernel, models="llama"):
                barrier.wait()
                assert changed(before) == {"LlamaRMSNorm.forward", "apply_rotary_pos_emb"}
                barrier.wait()

    runner = threading.Thread(target=run_model)
    others = [threading.Thread(target=enter_and_leave, args=(k,)) for k in (NORM, ROPE) * 4]
    for thread in (runner, *others):
        thread.start()
    for thread in others:
        thread.join()
    done.set()
    runner.join()
    assert not errors
    assert runs


def test_threads_share_one_block(before: dict[str, Any]) -> None:
    block = hf_kernel_patch.patched(ROPE, models="llama")
    barrier, inside = threading.Barrier(4, timeout=60), []

    def enter_and_leave() -> None:
        with block:
            barrier.wait()
            inside.append(changed(before))
            barrier.wait()

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [{"apply_rotary_pos_emb"}] * 4
