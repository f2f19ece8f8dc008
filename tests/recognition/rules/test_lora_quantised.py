"""Adapters over 4-bit and 8-bit layers of bitsandbytes, and over torchao's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_kernel_patch
from tests.support.adapters import CONFIG, KERNEL, step
from tests.support.probes import fallbacks, served
from tests.support.tiny import largest_error, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def quantised(tmp_path: Path) -> Any:
    """A model that was saved, loaded in NF4 with double quantisation and given adapters."""
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", torch.bfloat16, hidden_size=64, intermediate_size=128).save_pretrained(
        tmp_path
    )
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=four, dtype=torch.bfloat16
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return peft.get_peft_model(model, peft.LoraConfig(**CONFIG))


def test_layers_in_four_bits(quantised: Any) -> None:
    before = step(quantised)
    with hf_kernel_patch.patched(KERNEL, models="peft") as report:
        found = step(quantised)
        rows = {row.site: row for row in report}
        assert rows["peft.tuners.lora.bnb.Linear4bit.forward"].served == 14
        assert rows["peft.tuners.lora.bnb.Linear8bitLt.forward"].outcome == "patched"
        assert not fallbacks(report)
    assert largest_error(found, before) < 1e-2


def test_layers_of_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama", torch.bfloat16)
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    tuned = peft.get_peft_model(model, peft.LoraConfig(**CONFIG))
    before = step(tuned)
    with hf_kernel_patch.patched(KERNEL, models="peft") as report:
        found = step(tuned)
        assert served(report) + sum(fallbacks(report).values()) == 14
    assert largest_error(found, before) < 1e-2
