"""What models are run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from hf_kernel_patch.workload import as_batch, batch_of
from tests.support.tiny import VOCABULARY, tiny_model


def test_random_tokens_are_no_special_ones_and_the_same_for_a_seed() -> None:
    model = tiny_model("llama")
    one, same, other = (batch_of(model, batch=4, length=60, seed=seed) for seed in (1, 1, 2))
    ids = one["input_ids"]
    assert ids.shape == (4, 60) and int(ids.max()) < VOCABULARY
    assert not {0, 1, 2} & set(ids.flatten().tolist())
    assert torch.equal(ids, same["input_ids"]) and not torch.equal(ids, other["input_ids"])
    assert torch.equal(one["labels"], ids) and bool(one["attention_mask"].all())


def test_without_a_tokenizer_the_bytes_of_a_text_are_tokens(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh")
    said: list[str] = []
    batch = batch_of(tiny_model("llama"), batch=1, length=8, text=text, tell=said.append)
    assert batch["input_ids"].tolist() == [list(b"abcdefgh")]
    assert said == [f"no tokenizer: each byte of {text} is a token, modulo the vocabulary of 128"]
    with pytest.raises(ValueError, match="has 8 tokens, fewer than one sequence"):
        batch_of(tiny_model("llama"), length=9, text=text, tell=said.append)


def test_a_folder_s_tokenizer_is_used(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"one": 5, "two": 6, "?": 7}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("one two one")
    batch = batch_of(tiny_model("llama"), batch=2, length=3, text=text, folder=str(tmp_path))
    assert batch["input_ids"].tolist() == [[5, 6, 5]] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch is a number of at least 1"),
        ({"length": True}, "length is a number of at least 1"),
        ({"length": 65}, "65 tokens are more than the 64 this model takes"),
    ],
)
def test_sizes_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        batch_of(tiny_model("llama"), **options)


def test_what_a_user_hands_in() -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    given = BatchEncoding({"input_ids": ids, "labels": None, "use_cache": False})
    assert as_batch(given) == {"input_ids": ids, "use_cache": False}


@pytest.mark.parametrize(
    ("batch", "error", "said"),
    [
        (torch.ones(1, 2), TypeError, "this is a single tensor"),
        ([1, 2], TypeError, r"this is \[1, 2\]"),
        ({"input_ids": [[1, 2]]}, TypeError, "return_tensors='pt'"),
        ({3: torch.ones(1)}, TypeError, "the name of an argument is a string, not 3"),
        ({}, ValueError, "batch has no tensor; it has nothing"),
        ({"use_cache": True}, ValueError, "batch has no tensor; it has use_cache"),
    ],
)
def test_what_is_no_batch(batch: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        as_batch(batch)
