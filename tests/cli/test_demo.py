"""The demo: its text, its models, its two runs, and what it tells."""

from __future__ import annotations
import __future__

import math
import multiprocessing
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_kernel_patch
from hf_kernel_patch import devices, registry
from hf_kernel_patch.cli import demo
from hf_kernel_patch.cli.commands import app
from hf_kernel_patch.cli.demo import memory, models, worker
from hf_kernel_patch.cli.demo.text import batches, documentation
from tests.support.tiny import ops_of

TEXT = b"".join(b"line %d of a text that repeats itself\n" % i for i in range(200))


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> worker.Plan:
    """An eager run of two short steps; the model is to be saved into ``directory``."""
    monkeypatch.setattr(worker, "BATCH", 2)
    monkeypatch.setattr(worker, "LENGTH", 32)
    return worker.Plan("llama", str(tmp_path), TEXT, 2, 0, "cpu", "float32", None)


def trained(plan: worker.Plan) -> tuple[list[float], dict[str, Any]]:
    """Losses and facts of a run in this process."""
    _, *steps, facts = worker.training(plan)
    assert all(seconds > 0 for _, seconds in steps)
    return [loss for loss, _ in steps], facts


def invoke(*arguments: Any) -> Any:
    """The result of the command, which starts processes of its own."""
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


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


@pytest.mark.parametrize("name", models.MODELS)
def test_patched_run_of_each_model_repeats_the_losses_and_gives_everything_back(
    name: str, plan: worker.Plan
) -> None:
    models.save(name, 0, plan.directory)
    plan = replace(plan, model=name)
    eager, facts = trained(plan)
    assert not facts["report"].rows
    include = ("rms_norm", "rope", "swiglu", *(["moe"] if "moe" in ops_of(name) else []))
    patched, facts = trained(replace(plan, include=include))
    assert patched == pytest.approx(eager, abs=1e-4)
    assert {row.op for row in facts["report"].patched} == {*include}
    assert all(row.served and not row.fallbacks for row in facts["report"] if _is_called(row))
    assert facts["originals"].keys() >= {row.site for row in facts["report"]}
    assert all(facts["originals"].values())


def _is_called(row: Any) -> bool:
    # Qwen3-MoE has no dense MLP, unless its config asks for some, and nothing is generated.
    return not row.site.endswith(("Qwen3MoeMLP.forward", "_for_decode"))


def test_an_eager_run_stays_eager_in_an_environment_that_patches(
    plan: worker.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save("llama", 0, plan.directory)
    monkeypatch.setenv("HF_KERNEL_PATCH", "rms_norm")
    hf_kernel_patch.patch_transformers()
    _, facts = trained(plan)
    assert not facts["report"].rows


def test_a_run_that_is_told_to_end_goes_on_to_the_facts(plan: worker.Plan) -> None:
    models.save("llama", 0, plan.directory)
    run = worker.training(replace(plan, steps=9))
    next(run)
    assert len(next(run)) == 2
    assert run.send(True).keys() == {"report", "memory", "originals"}


def test_models_load_as_they_were_saved(tmp_path: Path) -> None:
    count = models.save("qwen3", 3, str(tmp_path))
    model = models.load(str(tmp_path), "cpu", "bfloat16")
    assert type(model).__module__ == "transformers.models.qwen3.modeling_qwen3"
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.num_parameters() == count
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight.bfloat16())


def test_peak_of_memory_sees_what_is_freed_again() -> None:
    before = memory.reset("cpu")
    block = bytearray(b"1") * (1 << 28)
    del block
    assert memory.peak("cpu") - before > 0.9 * (1 << 28)


def test_a_run_that_fails_is_told_with_its_trace(plan: worker.Plan) -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.send(replace(plan, directory=str(Path(plan.directory) / "absent")))
    worker.serve(theirs)
    with pytest.raises(hf_kernel_patch.KernelPatchError, match=r"'patched' failed:\nTraceback"):
        demo._answer({"patched": ours}, "patched")
    theirs.close()
    with pytest.raises(hf_kernel_patch.KernelPatchError, match="'patched' ended unexpectedly"):
        demo._answer({"patched": ours}, "patched")


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


def test_demo_tells_the_facts_of_both_runs_and_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SECONDS", 0)
    text, picture = tmp_path / "text.txt", tmp_path / "losses.png"
    text.write_bytes(TEXT)
    result = invoke("--text", text, "--device", "cpu", "--output", picture)
    assert result.exit_code == 0, result.output
    told = result.stdout
    assert "model: llama, " in told
    assert f"text: {text}, {len(TEXT):,} bytes; 100 steps" in told
    assert "stopped after 2 steps: 0 seconds were over" in told
    with hf_kernel_patch.patched(demo.choose("llama", "cpu")[0], models="llama") as report:
        for row in report:
            assert re.search(rf"{re.escape(row.site)} -> {row.kernel}: \d+ calls served\n", told)
    cells = r" +(\d+\.\d+) +(\d+\.\d+) +[\d,]+ +[\d,]+ MiB\n"
    as_it_is = re.search(f"as it is{cells}", told)
    patched = re.search(f"patched{cells}", told)
    assert as_it_is and patched
    first, last = map(float, as_it_is.groups())
    assert first == pytest.approx(math.log(259), abs=1)
    assert last < first
    assert [float(one) for one in patched.groups()] == pytest.approx([first, last], abs=2e-3)
    apart = re.search(r"largest difference between the loss curves: (\S+)\n", told)
    assert apart and float(apart[1]) < 1e-4
    assert f"{len(report)} places had been replaced; all " in told
    assert "hold the very objects that they held before" in told
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "lama"), 2, "unknown demo model 'lama'; did you mean 'llama'?"),
        (("--device", "gpu"), 2, "unknown device 'gpu'"),
        (("--text", "{tmp}/absent.txt"), 1, "absent.txt"),
        (("--text", "{tmp}/short.txt"), 2, "the text has 5 bytes; the demo needs 128"),
        (("--output", "{tmp}/absent/losses.png"), 1, "cannot write the picture to"),
        (("--output", "{tmp}"), 1, "cannot write the picture to"),
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
    result = invoke(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


def test_demo_names_the_extra_that_brings_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke()
    assert result.exit_code == 1
    assert "pip install 'hf_kernel_patch[bench]'" in result.stderr


def test_demo_does_not_start_where_everything_is_switched_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_KERNEL_PATCH_DISABLE", "1")
    result = invoke()
    assert (result.exit_code, result.stdout) == (1, "")
    assert "HF_KERNEL_PATCH_DISABLE is set" in result.stderr
