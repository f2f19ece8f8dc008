"""The benchmark commands on a CPU, at tiny shapes: what they write, not how long things take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from typer.testing import CliRunner

import hf_kernel_patch
from benchmarks.__main__ import app
from benchmarks.measure import cases, imports, processes, timing
from benchmarks.report import markdown, results
from benchmarks.workloads import models, ours, peers, shapes
from benchmarks.workloads.inputs import make_inputs, truth
from benchmarks.workloads.ops import FORWARDS, OPS
from hf_kernel_patch import registry
from hf_kernel_patch.kernels import BaseKernel, register_kernel
from tests.benchmarks.commands import Result, command, report, written

STACKED_EXPERTS = Version(transformers.__version__) >= Version("5")
QUICK = {case.op: case for case in shapes.QUICK}
LIMITS = {"copy_gbs": 10.0, "matmul_tflops": 0.1}


def run(case: shapes.Case, builders: dict[str, peers.Builder]) -> list[cases.Row]:
    return cases.run(case, builders, "cpu", torch.float32, LIMITS, seconds=0.0)


def test_ops_has_a_row_for_every_provider_and_phase_and_all_are_right(tmp_path: Path) -> None:
    printed = command("ops", "--quick", "--device", "cpu", "--out", str(tmp_path))
    found = written(tmp_path)
    assert found["limits"]["copy_gbs"] > 0 and found["limits"]["matmul_tflops"] > 0
    for op, case in QUICK.items():
        assert op in printed
        builders, absent = cases.providers(case, "cpu", compiled=False)
        own = {k.kernel_id for k in registry.kernels().values() if k.op == op}
        assert own & set(registry.available()) <= builders.keys()
        assert {*peers.PEERS[op], *own} <= {*builders, *absent}
        rows = [row for row in found["rows"] if row["op"] == op]
        phases = case.phases or OPS[op].phases
        places = {(row["provider"], row["phase"]) for row in rows}
        assert places == {(name, phase) for name in builders for phase in phases}
        for row in rows:
            if not (op == "moe" and not STACKED_EXPERTS and row["error"]):
                assert row["error"] is None
                assert row["median_s"] > 0 and row["bytes"] > 0
                assert max(row["errors"].values()) < 1e-5
                assert not row["overwrites"]
    text = report(tmp_path)
    assert all(f": {op}, fp32\n" in text for op in OPS)


def test_launch_has_a_row_for_every_provider_and_the_patched_original(tmp_path: Path) -> None:
    names = ("rms_norm", "swiglu")
    command("ops", *names, "--launch", "--quick", "--device", "cpu", "--out", str(tmp_path))
    found = written(tmp_path)
    assert {row["op"] for row in found["rows"]} == set(names)
    assert all(row["error"] is None for row in found["rows"])
    providers = {row["provider"] for row in found["rows"] if row["op"] == "rms_norm"}
    assert {"eager", "torch_fused_rmsnorm", "torch_fused_rmsnorm patched"} <= providers
    assert ": launch, fp32\n" in report(tmp_path)


def test_training_is_patched_in_its_own_process_and_computes_what_eager_does(
    tmp_path: Path,
) -> None:
    arguments = ("--quick", "--device", "cpu", "--only", "ours", "--out", str(tmp_path))
    printed = command("e2e", "llama-3.2-1b", *arguments, "--without-loss", "--adamw")
    found = written(tmp_path)
    (row,) = found["rows"]
    assert row["variant"] == "ours" and "patched" in row["patch"]
    assert not hf_kernel_patch.status().rows
    assert row["tokens_per_s"] > 0 and row["peak_gib"] > 0 and len(row["seconds"]) == 1
    ids = models.token_ids({**row, **found, "device": "cpu"}, row["length"])
    eager = models.build(found["config"], "cpu", torch.float32, None)
    assert row["loss"] == pytest.approx(eager(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert found["changes"]["hidden_size"] == 64 and "hidden_size" in printed
    assert "e2e llama-3.2-1b" in report(tmp_path)


def test_import_time_is_measured_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    command("imports", "--quick", "--out", str(tmp_path))
    (row,) = written(tmp_path)["rows"]
    assert row["heavy"] == []
    assert row["slowest"][0]["self_us"] >= row["slowest"][-1]["self_us"] > 0


def test_discovery_is_measured(tmp_path: Path) -> None:
    command("discovery", "--quick", "--out", str(tmp_path))
    (row,) = written(tmp_path)["rows"]
    assert 0 < row["median_ms"] <= row["largest_ms"]
    command("report", str(tmp_path), "--into", str(tmp_path / "RESULTS.md"))
    assert f"{row['median_ms']:.0f} ms of CPU time" in (tmp_path / "RESULTS.md").read_text()


def test_slowest_modules_are_read_from_what_python_prints() -> None:
    line = "import time: {:9} | {:9} | {}\n".format
    lines = line(90, 90, "zipimport") + line(7, 97, "site") + line(5, 5, "  b") + line(9, 14, "a")
    assert [row["module"] for row in imports.slowest(lines)] == ["a", "b"]


def test_a_provider_that_fails_gets_rows_and_stops_no_other() -> None:
    def broken(a: Any) -> peers.Built:
        def fail(x: Any) -> Any:
            raise RuntimeError("out of luck")

        return fail, (a.x,)

    rows = run(QUICK["rms_norm"], {"broken": broken, "eager": peers.PEERS["rms_norm"]["eager"]})
    assert [row["error"] for row in rows if row["provider"] == "eager"] == [None, None]
    failed = [row["error"] for row in rows if row["provider"] == "broken"]
    assert failed == ["RuntimeError: out of luck"] * 2


def test_a_wrong_result_and_an_overwritten_input_show_in_the_row() -> None:
    def careless(a: Any) -> peers.Built:
        def norm(x: Any, weight: Any) -> Any:
            with torch.no_grad():
                x.mul_(2)
            return x * weight

        return norm, (a.x, a.weight)

    forward, backward = run(QUICK["rms_norm"], {"careless": careless})
    assert forward["errors"]["out"] > 0.1 and backward["errors"]["d x"] > 0.1
    assert forward["overwrites"] == ["x"]


def test_a_kernel_registered_later_takes_part_by_itself() -> None:
    @register_kernel
    class Mine(BaseKernel):
        kernel_id = "mine_for_the_benchmark"
        op = "swiglu"
        function = staticmethod(lambda gate, up, activation: torch.nn.functional.silu(gate) * up)

    @register_kernel
    class Elsewhere(Mine):
        kernel_id = "mine_elsewhere"
        device = "npu"

    try:
        builders, absent = ours.kernels("swiglu", "cpu")
        rows = run(QUICK["swiglu"], {"mine": builders["mine_for_the_benchmark"]})
    finally:
        del registry.kernels()["mine_for_the_benchmark"], registry.kernels()["mine_elsewhere"]
    assert all(row["error"] is None and max(row["errors"].values()) < 1e-6 for row in rows)
    assert absent["mine_elsewhere"] == "it is for npu"


@pytest.mark.parametrize("op", ["rms_norm", "rope", "qk_norm_rope", "swiglu", "add_rms_norm"])
def test_fewest_bytes_are_those_of_the_tensors_read_and_written(op: str) -> None:
    case = QUICK[op]
    inputs = make_inputs(OPS[op], case, "cpu", torch.float32)
    found = truth(OPS[op], inputs, backward=True)
    read = sum(tensor.numel() for tensor in inputs.tensors())
    made = sum(found[name].numel() for name in OPS[op].outputs)
    assert OPS[op].work(case.sizes, inputs.arguments, "forward").elements == read + made
    gradients = sum(tensor.numel() for tensor in inputs.gradients)
    # The gradients of both summands are one tensor; rotating back needs neither q nor k.
    shared = inputs.arguments.x.numel() if op == "add_rms_norm" else 0
    unread = made if op == "rope" else shared
    back = sum(found[f"d {name}"].numel() for name in OPS[op].differentiable) - shared
    least = OPS[op].work(case.sizes, inputs.arguments, "backward").elements
    assert least == read - unread + gradients + back


def test_inputs_differ_by_round_and_come_back() -> None:
    inputs = make_inputs(OPS["rope"], QUICK["rope"], "cpu", torch.float32)
    first = inputs.arguments.q.detach().clone()
    inputs.restore(1)
    assert not torch.equal(inputs.arguments.q, first)
    with torch.no_grad():
        inputs.arguments.q.zero_()
    inputs.restore(2)
    assert torch.equal(inputs.arguments.q, first)
    assert inputs.arguments.q.transpose(1, 2).is_contiguous()


def test_every_case_is_of_an_op_and_every_op_has_cases_everywhere() -> None:
    for chosen in (shapes.ACCELERATOR, shapes.CPU, shapes.QUICK):
        assert {case.op for case in chosen} == set(OPS) == set(peers.PEERS)
        keys = [(case.op, case.label) for case in chosen]
        assert len(set(keys)) == len(keys)
        known = {*FORWARDS, "backward", "step"}
        assert all({*case.phases} <= known for case in chosen)


def test_a_task_runs_between_its_fewest_and_most_rounds_and_none_after_an_error() -> None:
    calls = []

    def late(_: Any) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise ValueError("late")

    tasks = {"late": timing.Task(lambda turn: turn, late), "fine": timing.Task(str, len)}
    found = timing.measure(tasks, "cpu", seconds=1e6, most=7)
    assert found["late"] == "ValueError: late" and len(calls) == 5
    assert len(found["fine"]) == 7
    assert len(timing.measure({"fine": tasks["fine"]}, "cpu", seconds=0)["fine"]) == 3


def test_models_are_cut_for_the_device_and_say_so() -> None:
    assert {"llama-3.2-1b", "llama-3.1-8b", "qwen2.5-1.5b", "qwen3-30b-a3b"} <= set(models.names())
    for name in models.names():
        whole = models.config(name, "cuda", quick=False)
        assert set(models.changes(name, whole)) <= {"num_hidden_layers"}
        assert models.config(name, "cpu", quick=False)["num_hidden_layers"] == 2
        assert models.config(name, "cpu", quick=True, layers=3)["num_hidden_layers"] == 3
    assert models.config("qwen3-30b-a3b", "cuda", quick=False)["num_hidden_layers"] == 8


def _imports_result(device: str, date: str, milliseconds: float) -> Result:
    row = {"statement_ms": milliseconds, "more_ms": 1.0, "heavy": [], "slowest": []}
    header: Result = {"kind": "imports", "dtype": "", "device": {"name": device}, "date": date}
    return header | {"versions": {}, "command": "python -m benchmarks", "rows": [row]}


def test_a_report_takes_the_newest_rows_and_keeps_sections_of_other_devices(tmp_path: Path) -> None:
    into = tmp_path / "RESULTS.md"
    results.write(_imports_result("first", "2026-01-01", 11.0), tmp_path / "a", "imports")
    markdown.write(results.merge(results.read([tmp_path / "a"])), into)
    results.write(_imports_result("second", "2026-01-03", 22.0), tmp_path / "b", "new")
    results.write(_imports_result("second", "2026-01-02", 33.0), tmp_path / "b", "old")
    markdown.write(results.merge(results.read([tmp_path / "b"])), into)
    once = into.read_text()
    assert "## first: imports" in once and "11.0 ms" in once
    assert "22.0 ms" in once and "33.0 ms" not in once
    markdown.write(results.merge(results.read([tmp_path / "b"])), into)
    assert into.read_text() == once


@pytest.mark.parametrize(
    "arguments",
    [("ops", "rmsnorm"), ("e2e", "gpt-2"), ("decode", "llama-3.2-1b", "--only", "fast")],
)
def test_unknown_names_are_refused(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "is none of" in done.output


def test_a_patched_process_is_refused() -> None:
    with hf_kernel_patch.patched("rms_norm", models="llama"):
        done = CliRunner().invoke(app, ["imports", "--quick"])
    assert done.exit_code == 2 and "patched already" in done.output


def test_a_worker_over_its_limit_says_so() -> None:
    found: dict[str, Any] = {}

    def done(name: str, batch: int, answer: Result) -> None:
        found[name] = answer

    processes.run({"eager": {}}, [1], together=False, rounds=1, limit=0.05, done=done)
    assert found["eager"]["error"] == "over its limit of 0.05 s"
