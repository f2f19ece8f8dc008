"""What a model is run on: random tokens, a text, or what a user hands in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.errors import cut, listed, shown

if TYPE_CHECKING:
    import torch
    from torch import nn


def batch_of(
    model: nn.Module,
    *,
    batch: int = 2,
    length: int = 64,
    text: Path | None = None,
    folder: str | None = None,
    seed: int = 0,
    tell: Callable[[str], object] = print,
) -> dict[str, torch.Tensor]:
    """Token ids, their mask and labels, on the device where the model begins.

    Args:
        batch: how many sequences.
        length: tokens of each.
        text: a file to take them from; without, they are random. Special tokens are left out.
        folder: where the model's tokenizer is. Without one, each byte of the text is a token.
        seed: which random tokens, or which places of the text.
        tell: is called with a line where there is something to say.

    Raises:
        ValueError: the sequences are longer than the model takes, or the text is too short.
    """
    import torch

    for name, value in (("batch", batch), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is a number of at least 1, not {shown(value)}")
    config = _text_config(model)
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < length:
        raise ValueError(f"length: {length} tokens are more than the {longest} this model takes")
    generator = torch.Generator().manual_seed(seed)
    words = _vocabulary(model, config)
    if text is None:
        special = _special(model, words)
        plain = torch.tensor([one for one in range(words) if one not in special])
        ids = plain[torch.randint(len(plain), (batch, length), generator=generator)]
    else:
        held = _tokens(text, folder, words, tell)
        if len(held) < length:
            raise ValueError(f"{cut(str(text))} has {len(held)} tokens, fewer than one sequence")
        begins = torch.randint(len(held) - length + 1, (batch,), generator=generator)
        ids = torch.stack([held[begin : begin + length] for begin in begins.tolist()])
    ids = ids.to(device_of(model))
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if {"pixel_values", "token_type_ids"} <= inspect.signature(model.forward).parameters.keys():
        made["token_type_ids"] = torch.zeros_like(ids)  # all is text, which some have to be told
    return {
        name: value for name, value in made.items() if name == "input_ids" or _takes(model, name)
    }


def as_batch(batch: object, model: nn.Module | None = None) -> dict[str, Any]:
    """What a user hands in as the arguments of a model's forward, checked.

    Args:
        batch: a mapping of names to tensors, such as what a tokenizer or a collator returns. Names
            with None are left out; flags such as ``use_cache`` stay as they are.
        model: where the tensors are taken to the device of; by default they stay.

    Raises:
        TypeError: it is no such mapping; the message says what to do.
        ValueError: there is no tensor in it.
    """
    import torch

    if not isinstance(batch, Mapping):
        what = "a single tensor" if isinstance(batch, torch.Tensor) else shown(batch)
        raise TypeError(
            "batch maps the names of the forward's arguments to tensors, such as "
            f"{{'input_ids': ids, 'labels': ids}}; this is {what}"
        )
    found: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(name, str):
            raise TypeError(f"batch: the name of an argument is a string, not {shown(name)}")
        if isinstance(value, torch.Tensor):
            found[name] = value if model is None else value.to(device_of(model))
        elif isinstance(value, bool | int | float | str):
            found[name] = value
        elif value is not None:
            raise TypeError(
                f"batch: {cut(name)} has to be a tensor, not {cut(type(value).__qualname__)}; a "
                "tokenizer returns tensors with return_tensors='pt'"
            )
    if not any(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"batch has no tensor; it has {listed(found, ', ') or 'nothing'}")
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: of one on several devices, where its embedding is."""
    import torch

    try:
        return next(model.get_input_embeddings().parameters()).device
    except (AttributeError, NotImplementedError, StopIteration, TypeError):
        return next((one.device for one in model.parameters()), torch.device("cpu"))


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    own = getattr(config, "get_text_config", None)
    return own() if callable(own) else config


def _vocabulary(model: Any, config: Any) -> int:
    """How many ids both the config and the embedding know."""
    sizes = [getattr(config, "vocab_size", None)]
    with suppress(AttributeError, NotImplementedError):
        sizes.append(model.get_input_embeddings().weight.shape[0])
    known = [one for one in sizes if isinstance(one, int) and one > 0]
    if not known:
        raise ValueError(
            f"{cut(type(model).__qualname__)} has no vocabulary: give verify() a batch in Python"
        )
    return min(known)


def _special(model: Any, words: int) -> set[int]:
    """Ids that stand for something else than text; none where they would be all."""
    found: set[int] = set()
    for config in (getattr(model, "config", None), _text_config(model)):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("token_id", "token_index")):
                found |= {one for one in (value if isinstance(value, list) else [value]) if one}
                found |= {0} if value == 0 else set()
    return found if len([one for one in found if 0 <= one < words]) < words else set()


def _takes(model: Any, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(one.name == name or one.kind is one.VAR_KEYWORD for one in parameters)


def _tokens(
    text: Path, folder: str | None, words: int, tell: Callable[[str], object]
) -> torch.Tensor:
    """The ids of a text: by the tokenizer of the folder, or else its bytes."""
    import torch

    held = text.read_bytes()
    tokenizer = None if folder is None else _tokenizer(folder)
    if tokenizer is None:
        more = "" if words > 255 else f", modulo the vocabulary of {words}"
        tell(f"no tokenizer: each byte of {cut(str(text))} is a token{more}")
        return torch.tensor(list(held)) % words
    content = held.decode(errors="replace")
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    found = torch.tensor(ids, dtype=torch.long)
    if len(found) and int(found.max()) >= words:
        raise ValueError(
            f"the tokenizer gives the id {int(found.max())}, and the model knows {words}"
        )
    return found


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # each kind of tokenizer fails in its own way where it has no files
        return None
