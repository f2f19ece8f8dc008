"""The lines about patches: what they say, and when a user sees them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import hf_kernel_patch
from hf_kernel_patch import Architecture, KernelPatchError, settings
from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching import log
from tests.support.probes import NORM, run_python
from tests.support.tiny import modelling, tiny_model

PATCHED = f"1 patched; kernels: {NORM}"
PENDING = f"1 pending; kernels: {NORM}"
NAME = "smollm3"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    handlers, level = log.logger.handlers[:], log.logger.level
    yield
    log.logger.handlers[:] = handlers
    log.logger.setLevel(level)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == "hf_kernel_patch"]


def test_a_line_says_what_became_of_pending_sites(
    not_imported: None, caplog: pytest.LogCaptureFixture
) -> None:
    hf_kernel_patch.patch_transformers(NORM, models=(NAME,), verbose=True)
    assert messages(caplog) == [PENDING]
    modelling(NAME)
    assert messages(caplog) == [PENDING, f"{NAME}: {PATCHED}"]
    hf_kernel_patch.patch_transformers(NORM, models=(NAME,), verbose=True)
    assert len(messages(caplog)) == 2


def test_what_a_strict_patch_refuses_is_not_said_to_be_patched(
    not_imported: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"SmolLM3RMSNorm.forward": "rms_norm.llama", "Gone.forward": "rms_norm.llama"}
    monkeypatch.setitem(architectures(), NAME, Architecture(NAME, rows))
    hf_kernel_patch.patch_transformers(NORM, models=NAME, strict=True, verbose=True)
    with pytest.raises(KernelPatchError, match="has no Gone"):
        modelling(NAME)
    assert messages(caplog) == [f"2 pending; kernels: {NORM}"]


def test_a_module_that_is_loaded_anew_has_its_line(
    not_imported: None, caplog: pytest.LogCaptureFixture
) -> None:
    with hf_kernel_patch.patched(NORM, models=(NAME,), verbose=True):
        module = modelling(NAME)
        del sys.modules[module.__name__]
        modelling(NAME)
    assert messages(caplog)[:2] == [PENDING, f"{NAME}: {PATCHED}"]


def test_every_way_of_patching_shows_its_line(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny_model("llama")
    hf_kernel_patch.apply_kernel(NORM, model=model, verbose=True)
    hf_kernel_patch.unpatch(model)
    hf_kernel_patch.apply_default_kernels(model, NORM, verbose=True)
    hf_kernel_patch.unpatch(model)
    assert messages(caplog) == [f"one LlamaForCausalLM: {PATCHED}"] * 2
    caplog.clear()

    @hf_kernel_patch.patched(NORM, models="llama", verbose=True)
    def called() -> None:
        pass

    called()
    called()
    assert messages(caplog) == [PATCHED]


def test_a_model_that_is_left_as_it_is_has_its_line(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny_model("llama")
    hf_kernel_patch.apply_default_kernels(model, config={"learning_rate": 1e-4}, verbose=True)
    hf_kernel_patch.apply_default_kernels(model, None, verbose=True)
    whys = ["the mapping has no kernel_config", "no kernel is chosen"]
    assert messages(caplog) == [f"one LlamaForCausalLM: nothing patched: {why}" for why in whys]


def said(capsys: pytest.CaptureFixture[str], verbose: bool) -> str:
    """What a patch says on stderr."""
    modelling("llama")
    hf_kernel_patch.patch_transformers(NORM, models="llama", verbose=verbose)
    hf_kernel_patch.unpatch()
    return capsys.readouterr().err


def test_without_logging_a_line_is_shown_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert said(capsys, False) == ""
    line = f"hf_kernel_patch: {PATCHED}\n"
    assert said(capsys, True) == line
    assert said(capsys, True) == line  # once, however often it is asked for
    log.show(logging.WARNING)
    assert said(capsys, False) == ""
    log.show()
    monkeypatch.setenv("RANK", "1")
    assert said(capsys, True) == ""


@pytest.mark.parametrize("name", [None, "hf_kernel_patch"], ids=["root", "own"])
def test_a_handler_of_the_program_gets_the_line_instead(
    name: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(log.logger, "handlers", [])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("mine: %(message)s"))
    logging.getLogger(name).handlers.append(handler)
    assert said(capsys, True) == f"mine: {PATCHED}\n"


def test_the_variable_shows_the_lines() -> None:
    program = (
        f"import hf_kernel_patch as h; h.patch_transformers({NORM!r}, models='llama'); h.unpatch()"
    )
    done = run_python(program, HF_KERNEL_PATCH_LOG="info")
    assert (done.returncode, done.stderr) == (0, f"hf_kernel_patch: {PENDING}\n")


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("info", logging.INFO),
        ("DEBUG", logging.DEBUG),
        (" warning ", logging.WARNING),
        ("off", None),
        ("0", None),
        ("", None),
    ],
)
def test_levels(text: str, level: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH_LOG", text)
    assert settings.log_level() == level


def test_a_level_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH_LOG", "inof")
    with pytest.raises(ValueError, match="'inof' in HF_KERNEL_PATCH_LOG; did you mean 'info'"):
        settings.log_level()
