"""Models that a command is given by a name or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_kernel_patch.errors import KernelPatchError
from hf_kernel_patch.workload import batch_of, load
from tests.support.tiny import tiny_config, tiny_model


@pytest.mark.versions
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3", "t5", "phi3", "mamba2"])
def test_a_model_type_is_a_small_model_that_learns(name: str) -> None:
    model = load(name, device="cpu")
    assert not model.training
    assert sum(one.numel() for one in model.parameters()) < 1_000_000
    loss = model(**batch_of(model, length=12)).loss
    loss.backward()
    assert loss.isfinite()


def test_random_weights_are_the_same_for_a_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (load("llama", device="cpu", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_dtype_is_that_of_every_weight(name: str) -> None:
    model = load("qwen3", dtype=name, device="cpu")
    assert {one.dtype for one in model.parameters()} == {getattr(torch, name)}


def test_layers_and_widths_of_a_model_type() -> None:
    for name, layers in (("llama", 3), ("gemma3_text", 5)):
        model: Any = load(name, device="cpu", layers=layers)
        assert len(model.model.layers) == layers
    wide: Any = load("gpt2", dtype="bfloat16", device="cpu", tiny=False, layers=1)
    assert len(wide.transformer.h) == 1
    assert wide.config.n_embd == type(wide.config)().n_embd > 64


def test_a_saved_model_has_its_weights_and_its_dtype(tmp_path: Path) -> None:
    saved = tiny_model("llama", torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model: Any = load(str(tmp_path), device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    assert load(str(tmp_path), dtype="float32", device="cpu").dtype == torch.float32
    first: Any = load(str(tmp_path), device="cpu", layers=1)
    assert len(first.model.layers) == 1
    assert torch.equal(
        first.model.layers[0].mlp.up_proj.weight, saved.model.layers[0].mlp.up_proj.weight
    )
    with pytest.raises(ValueError, match="has 2, which is less than 3"):
        load(str(tmp_path), device="cpu", layers=3)


def test_a_folder_without_weights_gets_random_ones_and_that_is_said(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    said: list[str] = []
    model = load(str(tmp_path), device="cpu", tell=said.append)
    assert model.config.hidden_size == 64
    assert said == [f"{tmp_path} has no weights: they are random"]


def test_an_adapter_comes_with_its_base_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    model = load(str(tmp_path / "adapter"), device="cpu")
    batch = batch_of(model, length=8)
    assert torch.equal(model(**batch).logits, adapted(**batch).logits)
    assert any(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize(
    ("model", "options", "error", "said"),
    [
        ("lama", {}, ValueError, "did you mean 'llama"),
        ("some/model", {}, ValueError, "not in the local cache"),
        ("", {}, ValueError, "expected a folder or a model type"),
        ("vit", {}, ValueError, "no class in transformers that reads tokens"),
        ("llama", {"dtype": "float8"}, ValueError, "unknown dtype 'float8'"),
        ("llama", {"device": "moon"}, ValueError, "unknown device 'moon'"),
        ("llama", {"layers": 0}, ValueError, "layers is a number of at least 1"),
        ("llama", {"seed": "x"}, ValueError, "seed is a number of at least 0"),
    ],
)
def test_mistakes_are_told(
    model: str, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as raised:
        load(model, **{"device": "cpu", **options})
    assert len(str(raised.value)) < 1000


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no saved model"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(KernelPatchError, match="transformers cannot read"):
        load(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="is a file"):
        load(str(tmp_path / "config.json"))
