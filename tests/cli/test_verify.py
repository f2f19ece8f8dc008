"""``hf-kernel-patch verify``: its table, its files and its exit status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_kernel_patch import registry
from hf_kernel_patch.kernels import register_kernel
from tests.cli.commands import invoke
from tests.support.probes import NORM, ROPE, SWIGLU
from tests.support.tiny import tiny_model

NAMES = f"{NORM},{ROPE},{SWIGLU}"
MLP = "transformers.models.llama.modeling_llama.LlamaMLP.forward"


@pytest.fixture
def wrong_swiglu() -> Iterator[str]:
    """A kernel whose result is off by a hundredth."""
    right = registry.kernels()[SWIGLU]

    def function(*arguments: Any) -> torch.Tensor:
        return 1.01 * right.load()(*arguments)

    members = {"kernel_id": "wrong_swiglu", "function": staticmethod(function)}
    register_kernel(type("Wrong", (right,), members))
    yield "wrong_swiglu"
    del registry.kernels()["wrong_swiglu"]


def test_a_model_type_is_verified() -> None:
    done = invoke("verify", "llama", "--include", NAMES, "--device", "cpu", "--length", 16)
    assert done.exit_code == 0, done.output
    first, *_ = done.stdout.splitlines()
    assert first == (
        "3 of 3 sites verified: no further from the truth than eager "
        "(float32, cpu, training, factor 3)"
    )
    assert "llama.modeling_llama.LlamaMLP.forward" in done.stdout
    assert "sites, part 1 of 2" in done.stderr and "part" not in done.stdout


def test_a_folder_a_text_and_all_that_was_found_as_json(tmp_path: Path) -> None:
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("All that is learnt here is a line or two.")
    written = tmp_path / "found.json"
    done = invoke(
        *("verify", tmp_path / "model", "--include", NORM, "--device", "cpu", "--eval"),
        *("--text", tmp_path / "text.txt", "--length", 8, "--batch", 3, "--json", written),
    )
    assert done.exit_code == 0, done.output
    assert "no tokenizer: each byte of" in done.stderr
    found = json.loads(written.read_text())
    assert found["ok"] and found["dtype"] == "bfloat16" and not found["train"]
    row = found["rows"][0]
    assert row["module"] == "model.layers.0.input_layernorm" and row["layer"] == 0
    assert {one["kind"] for one in row["measures"]} == {"output", "gradient"}
    assert {one["name"] for one in found["whole"]} >= {"loss", "logits"}


def test_a_wrong_kernel_ends_with_1_and_is_named(wrong_swiglu: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "errors.svg"
    asked = ("verify", "llama", "--include", f"{wrong_swiglu},{NORM}", "--device", "cpu")
    done = invoke(*asked, "--length", 16, "--plot", picture)
    assert done.exit_code == 1
    assert "1 of 2 sites are further from the truth than eager" in done.stdout
    assert "WORSE in 2 of 2, most in model.layers." in done.stdout
    assert f'leave out what is worse by exclude="{MLP}"' in done.stdout
    assert picture.read_text().startswith("<?xml")
    excluded = invoke(*asked, "--length", 16, "--exclude", MLP)
    assert excluded.exit_code == 0, excluded.output
    assert invoke(*asked, "--length", 16, "--factor", "1e9").exit_code == 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--include", "torch_fused_moe"), "nothing to verify: no site of this model was patched"),
        (("--include", "swiglu", "--exclude", "*LlamaMLP*"), "nothing to verify"),
        (("--include", "linear_cross_entropy", "--eval"), "nothing was verified: none of the 1"),
    ],
)
def test_nothing_verified_is_no_success(asked: tuple[str, ...], said: str) -> None:
    done = invoke("verify", "llama", "--device", "cpu", "--length", 16, *asked)
    assert done.exit_code == 1
    assert said in done.stdout


def test_the_folder_of_an_adapter_is_verified(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    asked = ("verify", tmp_path / "adapter", "--device", "cpu", "--length", 16)
    done = invoke(*asked, "--include", f"torch_fused_lora,{NORM}")
    assert done.exit_code == 0, done.output
    assert "2 of 2 sites verified" in done.stdout
    assert "peft.tuners.lora.layer.Linear.forward" in done.stdout


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["lama"], 2, "did you mean 'llama'"),
        (["llama", "--include", "nothing"], 2, "unknown kernel"),
        (["llama", "--dtype", "int8"], 2, "unknown dtype 'int8'"),
        (["llama", "--factor", "0.5"], 2, "factor is a number of at least 1"),
        (["llama", "--length", "999"], 2, "999 tokens are more than the 128 this model takes"),
        (["llama", "--text", "no-such-file"], 1, "no-such-file"),
        (["llama", "--json", "no/such/folder.json"], 1, "is not a file in a folder that exists"),
        (["llama", "--plot", "errors.doc"], 2, "endings of pictures"),
    ],
)
def test_mistakes_are_one_line(options: list[str], code: int, said: str) -> None:
    done = invoke("verify", *options, "--device", "cpu")
    assert done.exit_code == code, done.output
    assert said in done.stderr and not done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_a_text_that_is_not_there_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    asked = ("verify", "no-such-model", "--text", tmp_path / "no-such-text", "--device", "cpu")
    done = invoke(*asked)
    assert done.exit_code == 1 and "no-such-text" in done.stderr, done.output


def test_a_picture_without_anything_in_it_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = invoke(
        *("verify", "llama", "--include", "torch_fused_linear_cross_entropy", "--eval"),
        *("--device", "cpu", "--length", 16, "--plot", tmp_path / "errors.png"),
    )
    assert done.exit_code == 1 and "there is no picture to draw" in done.stderr
    assert "not served: evaluation: the logits are wanted" in done.stdout
