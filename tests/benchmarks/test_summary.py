"""README's picture and the figures that the demo quotes: from the raw files, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.report import markdown, results, summary
from hf_kernel_patch.cli.pictures import DARK, LIGHT
from tests.benchmarks.commands import command

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RATES = {"eager": 100.0, "liger": 120.0, "ours": 150.0}


def training(model: str, gpu: str = summary.GPU, **changes: Any) -> dict[str, Any]:
    """The result of a training run."""
    shared = {"model": model, "layers": 2, "batch": 4, "length": 8, "loss_of": "each"}
    shared |= {"step": "forward and backward", "error": None, "peak_gib": 3.0}
    shared |= {"first_s": 1.0, "loss": 2.0, "grad_norm": 1.0}
    rows = [
        {**shared, "variant": name, "tokens_per_s": rate, "patch": "kernels: a", **changes}
        for name, rate in RATES.items()
    ]
    return head("e2e", gpu, rows)


def decoding(model: str, patch: str) -> dict[str, Any]:
    """The result of decoding."""
    shared = {"model": model, "layers": 2, "batch": 1, "prompt": 8, "loss_of": "each"}
    shared |= {"step": "forward and backward", "error": None, "patch": patch, "peak_gib": 1.0}
    shared |= {"first_s": 1.0}
    rows = [
        {**shared, "variant": name, "tokens_per_s": rate, "ms_per_token": 1000 / rate}
        for name, rate in RATES.items()
    ]
    return head("decode", summary.GPU, rows)


def head(kind: str, gpu: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows with what every result says of its run."""
    found: dict[str, Any] = {"kind": kind, "device": {"type": "cuda", "name": gpu}, "rows": rows}
    found |= {"dtype": "bf16", "date": "2026-01-02T03:04", "versions": {"transformers": "5.0"}}
    return found | {"command": "python -m benchmarks", "changes": {}}


def texts(sections: summary.Sections) -> list[str]:
    """All words of the picture."""
    figure = summary._drawn(sections, summary.pictured(sections), LIGHT)
    return [
        text.get_text()
        for axes in figure.axes
        for text in (*axes.texts, *axes.get_yticklabels(), axes.title, axes._left_title)
        if text.get_text()
    ]


def test_the_figures_of_the_demo_are_those_of_the_raw_files(tmp_path: Path) -> None:
    figures, picture = tmp_path / "measured.json", tmp_path / "speedup.png"
    printed = command("summary", str(RESULTS), "--figures", str(figures), "--picture", str(picture))
    shipped = ROOT / "hf_kernel_patch" / "cli" / "demo" / "measured.json"
    assert shipped.read_text() == figures.read_text(), "run `python -m benchmarks summary`"
    assert "not in the picture, as not measured on " in printed
    for made, kept in (
        (picture, "speedup.png"),
        (tmp_path / "speedup-dark.png", "speedup-dark.png"),
    ):
        with Image.open(made) as new, Image.open(ROOT / "docs" / kept) as old:
            assert new.size == pytest.approx(old.size, rel=0.1)  # fonts differ by a little


def test_every_figure_of_the_demo_stands_in_results_md() -> None:
    shipped = ROOT / "hf_kernel_patch" / "cli" / "demo" / "measured.json"
    page = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for one in json.loads(shipped.read_text()):
        _, _, section = page.partition(f"## {one['gpu']}: {one['kind']} {one['model']}, bf16\n")
        section, _, _ = section.partition("\n## ")
        for side in (one["as_it_is"], one["patched"]):
            if "ms_per_token" in side:
                assert f"| {side['ms_per_token']:.2f} |" in section
            else:
                assert f"| {side['tokens_per_s']:.0f} | {side['peak_gib']:.2f} |" in section


def test_the_picture_says_what_was_not_measured_and_what_is_older() -> None:
    old = results.merge([training("llama-3.2-1b"), decoding("llama-3.2-1b", "kernels: x")])
    found = texts(old)
    assert "Llama-3.2-1B: training, tokens a second" in found
    assert "batch 1, prompt 8; 2026-01-02, before decode_attention" in found
    assert "0.15k   1.50x" in found
    assert "not measured on this GPU" not in found
    new = results.merge([training("llama-3.2-1b"), decoding("llama-3.2-1b", "decode_attention")])
    assert "batch 1, prompt 8; 2026-01-02" in texts(new)
    assert "not measured on this GPU" in texts(results.merge([training("llama-3.2-1b")]))


def test_only_like_figures_of_one_card_are_pictured() -> None:
    others = [
        training("qwen2.5-7b", gpu="another"),
        training("qwen2.5-1.5b", loss_of="transformers"),
        training("llama-3.1-8b", step="with AdamW"),
        training("qwen3-30b-a3b", error="out of memory"),
    ]
    assert summary.pictured(results.merge(others)) == []
    assert summary.write_picture(results.merge(others), Path("absent.png")) == []
    sections = results.merge([*others, training("qwen3-30b-a3b")])
    assert summary.pictured(sections) == ["qwen3-30b-a3b"]
    cells = list(summary.cells(sections))
    assert [(one["gpu"], one["model"]) for one in cells] == [
        (summary.GPU, "qwen3-30b-a3b"),
        ("another", "qwen2.5-7b"),
    ]
    assert cells[0]["as_it_is"]["tokens_per_s"] == RATES["eager"]
    assert cells[0]["patched"]["tokens_per_s"] == RATES["ours"]


def test_pictures_are_small_and_light_and_dark_and_named_in_results_md() -> None:
    page = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    named = {ROOT / "benchmarks" / name for name in re.findall(r'src(?:set)?="(.*?)"', page)}
    assert named == {*(ROOT / "benchmarks" / "charts").glob("*.png")}
    for path in (*named, *(ROOT / "docs").glob("speedup*.png")):
        assert path.stat().st_size < 150_000
        theme = DARK if path.stem.endswith("-dark") else LIGHT
        with Image.open(path) as picture:
            corner = picture.convert("RGB").getpixel((0, picture.height - 1))
        assert corner == tuple(bytes.fromhex(theme.background[1:]))


def test_a_chart_of_each_kind_has_a_dark_variant_beside_it(tmp_path: Path) -> None:
    sections = results.merge([training("llama-3.2-1b"), decoding("llama-3.2-1b", "kernels: x")])
    _, *charts = markdown.write(sections, tmp_path / "RESULTS.md")
    assert len(charts) == 4
    assert [path.stem.endswith("-dark") for path in charts] == [False, True] * 2
    assert all(path.exists() for path in charts)
