"""What was chosen is kept in files, and read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_kernel_patch.measuring import cache
from hf_kernel_patch.measuring.choice import Choice
from hf_kernel_patch.measuring.comparing import Comparison
from hf_kernel_patch.measuring.schedule import NOT_COMPARED, Verdict

KEY = {"model": "Llama", "device": ["cpu"], "size": 3}
FOUND = Comparison(1.032, 1.01, 1.05, 8)
MADE = Choice(Verdict(frozenset({"rope"}), {"rms_norm": FOUND, "rope": FOUND}, FOUND), 75)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_KERNEL_PATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_kept_is_found_again(folder: Path) -> None:
    assert cache.load(KEY) == (None, "")
    assert cache.store(KEY, MADE) == ""
    (file,) = folder.iterdir()
    found, problem = cache.load(KEY)
    assert found is not None and not problem
    assert (found.verdict, found.steps) == (MADE.verdict, MADE.steps)
    assert found.source == f"from {file}"
    assert cache.load({**KEY, "size": 4}) == (None, "")


def test_the_user_s_cache_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_KERNEL_PATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.file_of(KEY).parent == tmp_path / "hf_kernel_patch"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("choice"),
        lambda data: data["choice"].update(ops=[1]),
        lambda data: data["choice"].update(ops=None),
        lambda data: data["choice"].update(note=None),
        lambda data: data["choice"]["findings"].update(rope={"ratio": 1}),
        lambda data: data["choice"]["findings"]["rope"].update(ratio="many"),
        lambda data: data["choice"]["findings"]["rope"].update(ratio=float("nan")),
        lambda data: data["choice"]["findings"]["rope"].update(low=-1),
        lambda data: data["choice"].update(steps="x"),
    ],
)
def test_a_file_with_other_content_says_so(change: Any) -> None:
    cache.store(KEY, MADE)
    file = cache.file_of(KEY)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    found, problem = cache.load(KEY)
    assert found is None
    assert str(file) in problem and "measured anew" in problem


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_file_says_so(text: bytes, folder: Path) -> None:
    folder.mkdir()
    cache.file_of(KEY).write_bytes(text)
    found, problem = cache.load(KEY)
    assert found is None
    assert str(cache.file_of(KEY)) in problem
    assert cache.store(KEY, MADE) == ""
    assert cache.load(KEY)[0] is not None


def test_a_file_of_another_key_is_not_taken() -> None:
    cache.store(KEY, MADE)
    file = cache.file_of({"another": 1})
    cache.file_of(KEY).rename(file)
    assert cache.load({"another": 1}) == (None, "")


def test_a_folder_that_cannot_be_written_is_told(folder: Path) -> None:
    folder.write_text("a file")
    assert f"{cache.file_of(KEY)} cannot be written" in cache.store(KEY, MADE)


def test_of_a_distributed_job_the_first_process_alone_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cache.store(KEY, MADE) == ""
    assert not folder.exists()
    monkeypatch.setenv("RANK", "0")
    cache.store(KEY, MADE)
    assert len(list(folder.iterdir())) == 1


def test_texts_name_what_was_found_and_where_it_comes_from() -> None:
    where = "LlamaForCausalLM, cpu, training"
    assert MADE.why_out("rms_norm", where) == f"measured: 3.2% slower with it ({where})"
    assert MADE.text("rms_norm", where) == (
        f"measured: left out, 3.2% slower with it ({where}; measured now)"
    )
    assert "it served no call" in MADE.text("moe", where)
    assert MADE.summary() == (
        "rms_norm out (3.2% slower with it); rope in (3.2% slower with it); "
        "together 3.2% slower with it"
    )


def test_an_op_that_went_before_steps_were_too_few_says_so() -> None:
    verdict = Verdict(frozenset({"rope"}), {"rms_norm": FOUND, "rope": FOUND}, note=NOT_COMPARED)
    made = Choice(verdict, 225)
    assert made.text("rms_norm", "here") == (
        "measured: left out, 3.2% slower with it (here; measured now)"
    )
    assert made.said_of("rope") == NOT_COMPARED
    assert made.said_of("swiglu") == NOT_COMPARED


def test_a_user_without_a_home_is_told_that_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "~")  # what is left of a name that nobody has
    assert cache.store(KEY, MADE) == ""  # HF_KERNEL_PATCH_CACHE asks for no home
    for name in ("HF_KERNEL_PATCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache.load(KEY) == (None, "")
    assert cache.store(KEY, MADE).startswith("there is no folder for it (")
