"""``hf-kernel-patch bench``: models that are built, what is printed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

import hf_kernel_patch
from hf_kernel_patch.benchmarking.choosing import Choice
from hf_kernel_patch.benchmarking.result import Benchmark, Measured
from hf_kernel_patch.benchmarking.variants import alone, without
from hf_kernel_patch.cli import bench, bench_picture
from tests.cli.commands import invoke
from tests.support.probes import NORM, ROPE
from tests.support.tiny import tiny_model

SHORT = ("--rounds", "1", "--decode", "1", "--batch", "1", "--length", "8", "--models", "llama")


def test_a_saved_model_is_measured_and_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tiny_model("llama").save_pretrained(tmp_path / "saved")
    plot, file = tmp_path / "bench.svg", tmp_path / "bench.json"
    result = invoke(
        "bench", tmp_path / "saved", *SHORT, "--device", "cpu", "--include", f"{NORM},{ROPE}",
        "--plot", plot, "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("LlamaForCausalLM, 2 layers, 0.1 M parameters, float32 on cpu")
    assert "training: forward and backward" in lines
    assert "decoding: one generate(), reading the prompt included" in lines
    assert lines[-2:] == [f"picture: {plot}", f"JSON: {file}"]
    assert "random weights" not in result.stdout
    assert "[" in result.stderr and "measuring" in result.stderr
    assert plot.read_text().startswith("<?xml")
    read = json.loads(file.read_text())
    assert {row["variant"] for row in read["rows"]} >= {"eager", "patched", "rope alone"}
    assert not hf_kernel_patch.status().rows


def test_a_model_type_is_built_and_said_to_be(tmp_path: Path) -> None:
    result = invoke(
        "bench", "llama", *SHORT, "--device", "cpu", "--include", NORM, "--no-train", "--no-ops",
        "--layers", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("LlamaForCausalLM, 1 layer, ")
    assert "training: " not in result.stdout
    assert "random weights: a small llama, as this is a CPU." in result.stdout
    assert "/tmp" not in result.stdout and "no weights" not in result.stdout


@pytest.mark.versions
@pytest.mark.parametrize(("name", "small"), [("qwen3_moe", True), ("t5", False), ("gpt2", True)])
def test_small_models_of_other_types_run(name: str, small: bool) -> None:
    model, note = bench.build(bench.Model(name, None, "cpu", None, None, None))
    count = sum(one.numel() for one in model.parameters())
    assert 3e4 < count < 3e7
    assert name in note
    if small:
        assert f"a small {name}" in note


def choice(**changes: Any) -> Choice:
    return Choice({"include": NORM, "models": "llama", "strict": False}, rounds=2, **changes)


def test_an_interrupt_ends_it_with_what_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        def begin(self, title: str, steps: int | None = None) -> None: ...

        def step(self, done: int, text: str = "") -> None:
            if "round 2" in text:
                raise KeyboardInterrupt

    class Context:
        def __enter__(self) -> Interrupting:
            return Interrupting()

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(bench.progress, "on_stderr", Context)
    with pytest.raises(typer.Exit) as ended:
        bench.measure(
            bench.Model("llama", None, "cpu", 1, 1, 8), choice(decode=0, ops=False), None, None
        )
    assert ended.value.exit_code == 130
    said = capsys.readouterr()
    assert "interrupted; nothing stays patched" in said.err
    assert "1 round is too little to tell" in said.out
    assert not hf_kernel_patch.status().rows


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("lama",), 2, "did you mean"),
        (("llama", "--include", "rms_nrm"), 2, "did you mean 'rms_norm'"),
        (("llama", "--rounds", "0"), 2, "--rounds"),
        (("llama", "--no-train", "--decode", "0"), 2, "neither train nor decode"),
        (("llama", "--device", "cuda:9000"), 2, "device"),
        (("llama", "--dtype", "float12"), 2, "unknown dtype 'float12'"),
        (("llama", "--plot", "bench.doc"), 2, "cannot write a picture as .doc"),
        (("llama", "--json", "absent/bench.json"), 1, "is not a file in a folder that exists"),
        (("llama", "--include", "none", "--device", "cpu"), 1, "nothing to measure"),
        (("llama", "--device", "cpu", "--length", "5000"), 2, "length: 5000 tokens"),
    ],
)
def test_bench_refuses_what_it_cannot_do(
    arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = invoke("bench", *arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert message in " ".join(result.stderr.split())


def found_of(gain: float) -> Benchmark:
    def row(variant: str, seconds: float) -> Measured:
        times = tuple(seconds + 0.001 * (number % 3 - 1) for number in range(12))
        return Measured("training", variant, 512, times, (2**20,) * 12)

    rows = [row("eager", 0.2), row("patched", 0.2 - gain), row("compile", 0.15)]
    rows += [row(alone("rope"), 0.2 - gain), row(without("rope"), 0.2)]
    return Benchmark("a model", tuple(rows), ("rope",), 12)


def test_the_picture_has_a_bar_a_variant_with_its_speed_and_one_for_each_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for gain in (0.1, -0.1):
        bench_picture.draw(tmp_path / "x.png", found_of(gain))
        speeds, memory, gains = drawn[-1].axes
        names = [label.get_text() for label in speeds.get_yticklabels()]
        assert names == ["eager", "rope alone", "without rope", "compile", "patched"]
        assert speeds.texts[0].get_text() == "2,560"
        assert speeds.texts[-1].get_text() == ("5,120  2.00x" if gain > 0 else "1,707  0.67x")
        assert [text.get_text() for text in memory.texts] == ["1"] * 5
        assert [bar.get_width() for bar in gains.patches] == pytest.approx([gain * 1e3] * 2)
        assert [text.get_text() for text in gains.texts] == [f"{gain * 1e3:+.2f}"] * 2
        left, right = gains.get_xlim()
        assert left <= min(0, gain * 1e3) and right > max(0, gain * 1e3)


def test_a_picture_of_failures_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [Measured("training", one, 512, failed="out of memory") for one in ("eager", "patched")]
    bench_picture.draw(tmp_path / "x.png", Benchmark("a model", tuple(rows), (), 12))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
