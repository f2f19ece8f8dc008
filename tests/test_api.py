"""The public functions: arguments, warnings, and the decorator."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import KernelPatchError, KernelPatchWarning
from tests.support.probes import LAYERS, MOE, NORM, ROPE, changed, llama, places
from tests.support.tiny import modelling, tiny_model

NORM_PLACE = {"LlamaRMSNorm.forward"}


@pytest.fixture
def before() -> dict[str, Any]:
    for name in ("llama", "qwen2"):
        modelling(name)
    return places()


def test_every_public_name_exists_and_says_what_it_is() -> None:
    for name in hf_kernel_patch.__all__:
        thing = getattr(hf_kernel_patch, name)
        assert isinstance(thing, str) or inspect.getdoc(thing), name


@pytest.mark.parametrize("include", [None, False, "false", "null", "", ()])
def test_nothing_is_patched_when_nothing_is_asked_for(include: Any, before: dict[str, Any]) -> None:
    report = hf_kernel_patch.patch_transformers(include)
    assert len(report) == 0
    assert "nothing patched" in report.summary()
    assert changed(before) == set()
    with hf_kernel_patch.patched(include):
        assert changed(before) == set()


@pytest.mark.parametrize("arguments", [(), ("auto",), (True,), ("1",)])
def test_auto_takes_the_defaults_of_this_device(
    arguments: tuple[Any, ...], before: dict[str, Any]
) -> None:
    with hf_kernel_patch.patched(*arguments, models="llama") as report:
        kernels = {row.kernel for row in report}
    assert kernels <= set(hf_kernel_patch.get_default_kernels())
    if not torch.accelerator.is_available():
        assert kernels >= {NORM, ROPE}
    assert changed(before) == set()


def test_auto_that_finds_nothing_is_no_error(before: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = hf_kernel_patch.patch_transformers(
            "auto", models="llama", exclude=hf_kernel_patch.get_default_kernels(), strict=True
        )
    assert len(report) == 0
    hf_kernel_patch.unpatch()


@pytest.mark.parametrize("include", [NORM, "rms_norm", [NORM], (n for n in (NORM,)), f"{NORM},"])
def test_include_takes_ids_and_ops_in_every_form(include: Any, before: dict[str, Any]) -> None:
    hf_kernel_patch.patch_transformers(include, models="llama", backend="torch")
    assert changed(before) == NORM_PLACE
    hf_kernel_patch.unpatch()


def test_exclude_and_models_narrow_the_choice(before: dict[str, Any]) -> None:
    ids = ",".join(LAYERS)
    with hf_kernel_patch.patched(ids, exclude=("rope", LAYERS[2]), models="llama") as report:
        assert [row.site for row in report] == [f"{llama().__name__}.LlamaRMSNorm.forward"]
        assert changed(before) == NORM_PLACE


@pytest.mark.parametrize("form", ["mapping", "loaded"])
def test_config_is_taken_and_arguments_win(form: str, before: dict[str, Any]) -> None:
    config: Any = {"name": "auto", "include_kernels": ROPE, "models": "llama"}
    if form == "loaded":
        config = hf_kernel_patch.load_kernel_config({"kernel_config": config})
    with hf_kernel_patch.patched(config=config):
        assert changed(before) == {"apply_rotary_pos_emb"}
    hf_kernel_patch.patch_transformers(NORM, config=config)
    assert changed(before) == NORM_PLACE
    hf_kernel_patch.unpatch()


def test_environment_chooses_where_arguments_do_not(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", NORM)
    monkeypatch.setenv("HF_KERNEL_PATCH_MODELS", "llama")
    with hf_kernel_patch.patched():
        assert changed(before) == NORM_PLACE
    with hf_kernel_patch.patched(models="qwen2", config={"models": "gemma"}):
        assert changed(before) == {"Qwen2RMSNorm.forward"}
    monkeypatch.setenv("HF_KERNEL_PATCH_DISABLE", "1")
    with hf_kernel_patch.patched(NORM, models="llama", backend="npu"):
        assert changed(before) == set()
    model = tiny_model("llama", num_hidden_layers=1)
    kind = type(model.model.norm)
    assert hf_kernel_patch.apply_kernel(NORM, model=model) is model
    assert hf_kernel_patch.apply_default_kernels(model, NORM) is model
    assert type(model.model.norm) is kind


def test_a_kernel_that_finds_no_site_warns_and_has_a_row(before: dict[str, Any]) -> None:
    with pytest.warns(KernelPatchWarning, match=f"{MOE} found no site in llama, qwen2"):
        report = hf_kernel_patch.patch_transformers((NORM, MOE), models=("llama", "qwen2"))
    assert [(row.kernel, row.outcome) for row in report if row.outcome != "patched"] == [
        (MOE, "skipped")
    ]
    assert "found no site in llama" in report.skipped[0].reason
    assert changed(before) == {"LlamaRMSNorm.forward", "Qwen2RMSNorm.forward"}
    hf_kernel_patch.unpatch()


@pytest.mark.parametrize("call", [hf_kernel_patch.patch_transformers, hf_kernel_patch.patched])
def test_a_kernel_that_finds_no_site_raises_when_strict(
    call: Any, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(**strict: bool) -> None:
        made = call((NORM, MOE), models="llama", **strict)
        if call is hf_kernel_patch.patched:
            made.__enter__()

    with pytest.raises(KernelPatchError, match=f"{MOE} found no site in llama"):
        ask(strict=True)
    monkeypatch.setenv("HF_KERNEL_PATCH_STRICT", "1")
    with pytest.raises(KernelPatchError, match=f"{MOE} found no site in llama"):
        ask()
    assert changed(before) == set()
    assert not hf_kernel_patch.status().rows


def test_warnings_point_at_the_callers_line() -> None:
    with pytest.warns(KernelPatchWarning) as caught:
        hf_kernel_patch.patch_transformers(MOE, models="llama")
    with pytest.warns(KernelPatchWarning) as again, hf_kernel_patch.patched(MOE, models="qwen2"):
        pass
    hf_kernel_patch.unpatch()
    assert {warning.filename for warning in (*caught, *again)} == {__file__}


def test_decorator_patches_while_the_function_runs(before: dict[str, Any]) -> None:
    @hf_kernel_patch.patched(NORM, models="llama")
    def function(one: int, *, two: int = 2) -> tuple[int, int, set[str]]:
        """Says what it got."""
        return one, two, changed(before)

    assert changed(before) == set()
    assert function(1, two=3) == (1, 3, NORM_PLACE)
    assert function(1) == (1, 2, NORM_PLACE)
    assert changed(before) == set()
    assert (function.__name__, function.__doc__) == ("function", "Says what it got.")
    assert list(inspect.signature(function).parameters) == ["one", "two"]


def test_decorator_restores_when_the_function_raises(before: dict[str, Any]) -> None:
    @hf_kernel_patch.patched(NORM, models="llama")
    def function() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        function()
    assert changed(before) == set()


def test_decorator_on_methods(before: dict[str, Any]) -> None:
    block = hf_kernel_patch.patched(NORM, models="llama")

    class Trainer:
        @block
        def step(self) -> tuple[Any, set[str]]:
            return self, changed(before)

        @classmethod
        @block
        def build(cls) -> tuple[Any, set[str]]:
            return cls, changed(before)

        @staticmethod
        @block
        def free() -> set[str]:
            return changed(before)

    trainer = Trainer()
    assert trainer.step() == (trainer, NORM_PLACE)
    assert trainer.build() == (Trainer, NORM_PLACE)
    assert trainer.free() == NORM_PLACE
    assert changed(before) == set()


def test_decorator_on_a_coroutine_function(before: dict[str, Any]) -> None:
    @hf_kernel_patch.patched(NORM, models="llama")
    async def function(value: int) -> tuple[int, set[str], set[str]]:
        first = changed(before)
        await asyncio.sleep(0)
        return value, first, changed(before)

    async def together() -> list[Any]:
        started = function(0)
        assert changed(before) == set()  # a coroutine that does not run yet patches nothing
        return [await started, *await asyncio.gather(function(1), function(2))]

    assert inspect.iscoroutinefunction(function)
    assert asyncio.run(together()) == [(n, NORM_PLACE, NORM_PLACE) for n in range(3)]
    assert changed(before) == set()


def test_decorator_on_a_coroutine_that_is_cancelled(before: dict[str, Any]) -> None:
    @hf_kernel_patch.patched(NORM, models="llama")
    async def function() -> None:
        await asyncio.sleep(60)

    async def cancel() -> set[str]:
        task = asyncio.ensure_future(function())
        await asyncio.sleep(0)
        inside = changed(before)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return inside

    assert asyncio.run(cancel()) == NORM_PLACE
    assert changed(before) == set()


def test_decorator_refuses_generators() -> None:
    def generator() -> Any:
        yield

    async def stream() -> Any:
        yield

    for function in (generator, stream):
        with pytest.raises(TypeError, match=f"{function.__name__} is a generator"):
            hf_kernel_patch.patched(NORM)(function)


def test_one_block_is_reentrant(before: dict[str, Any]) -> None:
    block = hf_kernel_patch.patched(NORM, models="llama")

    @block
    def recurse(depth: int) -> int:
        assert changed(before) == NORM_PLACE
        return 0 if depth == 0 else 1 + recurse(depth - 1)

    with block as outer:
        with block as inner:
            assert changed(before) == NORM_PLACE
            assert inner.rows is not outer.rows
        assert changed(before) == NORM_PLACE
        assert recurse(3) == 3
        assert changed(before) == NORM_PLACE
    assert changed(before) == set()
    with block:
        assert changed(before) == NORM_PLACE


def test_a_block_reads_the_environment_when_it_is_made(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH", NORM)
    block = hf_kernel_patch.patched(models="llama")
    monkeypatch.setenv("HF_KERNEL_PATCH", ROPE)
    with block:
        assert changed(before) == NORM_PLACE
