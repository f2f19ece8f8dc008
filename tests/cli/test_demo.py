"""The demo: its text, what it refuses, and what it tells."""

from __future__ import annotations
import __future__

import io
import math
import multiprocessing
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch import devices, registry
from hf_kernel_patch.cli import demo
from hf_kernel_patch.cli.demo import models, progress, worker, workers
from hf_kernel_patch.cli.demo.comparison import EAGER, PATCHED
from hf_kernel_patch.cli.demo.text import batches, documentation
from hf_kernel_patch.cli.demo.words import FUSED
from tests.cli.commands import invoke
from tests.cli.short_demo import PLAN, SHORT, TEXT
from tests.support.tiny import ops_of


def test_the_text_is_the_documentation_of_the_standard_library() -> None:
    text = documentation(20_000)
    assert 20_000 <= len(text) < 200_000
    assert __future__.__doc__ is not None
    assert __future__.__doc__.strip().encode() in text
    assert text == documentation(20_000)


def test_without_sources_of_the_library_a_text_has_to_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--text"):
        documentation()


def test_batches_are_pieces_of_the_text_and_follow_the_seed() -> None:
    made = batches(TEXT, steps=3, size=4, length=16, seed=5)
    assert (made.shape, made.dtype) == ((3, 4, 16), torch.int64)
    assert all(bytes(row.tolist()) in TEXT for row in made.flatten(0, 1))
    assert torch.equal(made, batches(TEXT, 3, 4, 16, seed=5))
    assert not torch.equal(made, batches(TEXT, 3, 4, 16, seed=6))


def test_a_text_of_just_one_piece_is_enough_and_a_shorter_one_is_not() -> None:
    assert bytes(batches(TEXT[:16], 1, 1, 16, 0).flatten().tolist()) == TEXT[:16]
    with pytest.raises(ValueError, match="15 bytes; it needs 16"):
        batches(TEXT[:15], 1, 1, 16, 0)


def test_a_run_that_fails_is_told_with_its_trace() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process()
    running = workers.Workers({PATCHED: ours}, {PATCHED: process}, progress.Lines())
    running.send(PATCHED, replace(PLAN, model="absent"))
    worker.serve(theirs)
    with pytest.raises(hf_kernel_patch.KernelPatchError, match=r"'patched' failed:\nTraceback"):
        running.answer(PATCHED)


def test_kernels_are_the_defaults_or_else_all_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = [k for k in registry.defaults().values() if k.op in ops_of("llama")]
    include, words = demo.choose("llama", devices.current())
    if defaults:
        assert include == "auto"
    assert all(kernel.kernel_id in words for kernel in defaults)
    for kernel in registry.kernels().values():
        monkeypatch.setattr(kernel, "default_on", ())
    include, words = demo.choose("llama", devices.current())
    assert {registry.kernels()[kernel_id].backend for kernel_id in include} == {"torch"}
    assert {registry.kernels()[kernel_id].op for kernel_id in include} == {*ops_of("llama")}
    assert f'as "auto" takes none on {devices.current()}' in words


def test_every_op_has_plain_words() -> None:
    assert FUSED.keys() == registry.ops()


def test_demo_tells_what_it_gives_and_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("SECONDS", "DECODING_SECONDS"):
        monkeypatch.setattr(demo, limit, 0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(models, "size_on", lambda device: SHORT)
    monkeypatch.setenv("HF_KERNEL_PATCH", "swiglu")
    text, picture = tmp_path / "text.txt", tmp_path / "demo.JPG"
    text.write_bytes(TEXT)
    result = invoke("demo", "--text", text, "--device", "cpu", "--output", picture)
    assert result.exit_code == 0, result.output
    told = result.stdout
    assert "model: llama, " in told
    assert f"text: {text}, {len(TEXT):,} bytes\n" in told
    assert "not used here: HF_KERNEL_PATCH; the demo chooses for itself" in told
    assert "stopped after 2 of 100 steps: 0 seconds were over" in told
    with hf_kernel_patch.patched(demo.choose("llama", "cpu")[0], models="llama") as report:
        for row in report:
            assert f"- {': '.join(FUSED[row.op])}\n" in told
            served = rf"{re.escape(row.site)} -> {row.kernel}: \d+ calls served in this step\n"
            assert re.search(served, told)
    cells = r" +(\d+\.\d+) +(\d+\.\d+) +[\d,]+ +[\d,]+ to [\d,]+ +[\d,]+ MiB\n"
    as_it_is = re.search(f"{EAGER}{cells}", told)
    patched = re.search(f"{PATCHED}{cells}", told)
    assert as_it_is and patched
    first, last = map(float, as_it_is.groups())
    assert first == pytest.approx(math.log(259), abs=1)
    assert last < first
    assert [float(one) for one in patched.groups()] == pytest.approx([first, last], abs=2e-3)
    apart = re.search(r"largest difference between the losses of a step: (\S+)\n", told)
    assert apart and float(apart[1]) < 1e-4
    assert re.search(r"speed-up: \d+\.\d\d times, turn by turn \(middle half ", told)
    assert re.search(rf"- {PATCHED}: \d+\.\d\d ms a token\n", told)
    assert "both runs decode the same\n" in told
    assert "The logits alone are 31 MiB" in told
    assert "The gain is on GPUs. Measured there:\n" in told
    assert "x as fast" in told
    assert f"{len(report)} sites had been patched; all " in told
    assert "hold the very objects that they held before" in told
    assert picture.read_bytes().startswith(b"\xff\xd8\xff")
    assert "training: 1 of 100, loss as it is " in result.stderr
    assert "decoding: 2 of 4" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "lama"), 2, "unknown demo model 'lama'; did you mean 'llama'?"),
        (("--device", "gpu"), 2, "unknown device 'gpu'"),
        (("--text", "{tmp}/absent.txt"), 1, "absent.txt"),
        (("--text", "{tmp}/short.txt"), 2, "the text has 5 bytes; the demo needs 128"),
        (("--output", "{tmp}/absent/losses.png"), 1, "cannot write the picture to"),
        (("--output", "{tmp}"), 1, "cannot write the picture to"),
        (("--output", "x.bmp"), 2, "cannot write a picture as .bmp (x.bmp); endings of pictures: "),
        (("--steps", "1"), 2, "steps"),
        pytest.param(
            ("--device", "npu"),
            1,
            "no npu device",
            marks=pytest.mark.skipif(devices.current() == "npu", reason="has the device"),
        ),
    ],
)
def test_demo_refuses_before_it_trains(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("short")
    result = invoke("demo", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "code", "message"),
    [
        ("HF_KERNEL_PATCH", "rms_nrm", 2, "unknown kernel id or op 'rms_nrm' in the variable HF_"),
        ("HF_KERNEL_PATCH_MODELS", "lama", 2, "unknown model 'lama' in the variable HF_KERNEL_"),
        ("HF_KERNEL_PATCH_COUNT", "maybe", 2, "HF_KERNEL_PATCH_COUNT must be one of 1, 0"),
        ("HF_KERNEL_PATCH_DISABLE", "1", 1, "HF_KERNEL_PATCH_DISABLE is set"),
    ],
)
def test_demo_refuses_variables_that_cannot_be_read_and_the_one_that_switches_off(
    variable: str, value: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    result = invoke("demo")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


def test_demo_names_the_extra_that_brings_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("demo")
    assert result.exit_code == 1
    assert "pip install 'hf_kernel_patch[bench]'" in result.stderr


def test_lines_of_progress_come_when_a_part_begins_and_then_at_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([0.0, 1.0, 5.0, 10.9, 11.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.on_stderr() as told:
        told.begin("training", 100)  # at 1
        told.step(3, "loss 4.00")  # at 5
        told.beat()  # at 10.9
        told.beat()  # at 11, which is also when the line is written
    lines = stderr.getvalue().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "training",
        "training: 3 of 100, loss 4.00",
    ]
