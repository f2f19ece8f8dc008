"""What a family is trained on: token ids, and an image or sound where its class takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

BATCH, LENGTH = 2, 17
_FIRST, _LAST = 3, 100  #: Plain tokens; special ones lie below and above.


def ids(batch: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    """(batch, length) random token ids that are no special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(_FIRST, _LAST, (batch, length), generator=generator)


def noise(*shape: int) -> torch.Tensor:
    """Random numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def text(model: Any) -> dict[str, Any]:
    """Token ids alone."""
    return {"input_ids": ids()}


def pixels(model: Any) -> dict[str, Any]:
    """An image for each row, where tokens of the image stand for its features."""
    image = {"pixel_values": noise(BATCH, 3, *[_size(model.config)] * 2)}
    found = {**_with_tokens(model, image), **image}
    if model.config.model_type == "gemma3":  # before transformers 5.6 it trains with them alone
        found["token_type_ids"] = (found["input_ids"] == _image_token(model.config)).int()
    return found


def sized(model: Any) -> dict[str, Any]:
    """As ``pixels``, with the size of each image."""
    size = _size(model.config)
    sizes = torch.tensor([[size, size]] * BATCH)
    image = {"pixel_values": noise(BATCH, 3, size, size), "image_sizes": sizes}
    return {**_with_tokens(model, image), **image}


def tiles(model: Any) -> dict[str, Any]:
    """As ``pixels``, with two tiles for each image."""
    size = _size(model.config)
    image = {"pixel_values": noise(BATCH, 2, 3, size, size)}
    if _takes(model, "image_sizes"):
        image["image_sizes"] = torch.tensor([[size, size]] * BATCH)
    return {**_with_tokens(model, image), **image}


def grid(model: Any) -> dict[str, Any]:
    """Flat patches of one image a row, four by four of them, as Qwen2-VL takes them."""
    vision = _vision(model.config)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    depth = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)
    patch = vision.patch_size**2 * channels * depth
    return _grid(model, noise(BATCH * 16, patch))


def squares(model: Any) -> dict[str, Any]:
    """As ``grid``, with patches that are (channels, height, width) still."""
    vision = _vision(model.config)
    return _grid(model, noise(BATCH * 16, 3, vision.patch_size, vision.patch_size))


def _grid(model: Any, patches: torch.Tensor) -> dict[str, Any]:
    image: dict[str, Any] = {
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    }
    if _takes(model, "image_merge_sizes"):
        image["image_merge_sizes"] = torch.tensor([1] * BATCH)
    found = _with_tokens(model, image)
    if _takes(model, "mm_token_type_ids"):
        found["mm_token_type_ids"] = (found["input_ids"] == _image_token(model.config)).int()
    return {**found, **image}


def shown(model: Any) -> dict[str, Any]:
    """An image for each row beside the token ids, without tokens that stand for it."""
    return {"input_ids": ids(), "pixel_values": noise(BATCH, 3, *[_size(model.config)] * 2)}


def speech(model: Any) -> dict[str, Any]:
    """Log-mel features, (batch, mels, frames), for an encoder and token ids as labels."""
    frames = 2 * getattr(model.config, "max_source_positions", 32)
    return {"input_features": noise(BATCH, _mels(model.config), frames)}


def frames(model: Any) -> dict[str, Any]:
    """Features of sound, (batch, frames, mels), for an encoder and token ids as labels."""
    return {
        "input_features": noise(BATCH, 64, _mels(model.config)),
        "attention_mask": torch.ones(BATCH, 64, dtype=torch.long),
    }


def wave(model: Any) -> dict[str, Any]:
    """Raw sound, (batch, samples), for an encoder and token ids as labels."""
    return {"input_values": noise(BATCH, 4000)}


def typed(model: Any) -> dict[str, Any]:
    """Token ids, and that each is text."""
    return {"input_ids": ids(), "mm_token_type_ids": torch.zeros_like(ids())}


def boxed(model: Any) -> dict[str, Any]:
    """Token ids, and where on a page they stand."""
    box = torch.tensor([0.1, 0.1, 0.5, 0.5])
    return {"input_ids": ids(), "bbox": box.expand(BATCH, LENGTH, 4).clone()}


def flattened(model: Any) -> dict[str, Any]:
    """Patches with their row and column in front, and token ids as labels."""
    width = model.config.vision_config.patch_embed_hidden_size
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float()
    patches = noise(BATCH, 16, width)
    return {"flattened_patches": torch.cat([places.expand(BATCH, -1, -1), patches], -1)}


def masked(model: Any) -> dict[str, Any]:
    """One image for each row, and which tokens may look at it."""
    size = _size(model.config)
    return {
        "input_ids": ids(),
        "attention_mask": torch.ones_like(ids()),
        "pixel_values": noise(BATCH, 1, 3, size, size),
        "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
    }


def codes(model: Any) -> dict[str, Any]:
    """A row of codes for each codebook of each sequence, (batch * codebooks, length)."""
    books = model.config.num_codebooks
    rows = ids(BATCH * books)
    return {"input_ids": rows, "labels": rows.view(BATCH, books, -1).transpose(1, 2)}


def channels(model: Any) -> dict[str, Any]:
    """A text token and a code of each codebook at every step, (batch, length, 1 + codebooks)."""
    rows = ids(BATCH * (1 + model.config.num_codebooks))
    return {"input_ids": rows.view(BATCH, -1, LENGTH).transpose(1, 2), "labels": ids()}


def spoken(model: Any) -> dict[str, Any]:
    """Text for an encoder, codes of every channel for a decoder."""
    count = model.config.decoder_config.num_channels
    rows = ids(BATCH * count)
    return {
        "input_ids": ids(),
        "decoder_input_ids": rows.view(BATCH, count, LENGTH).transpose(1, 2).contiguous(),
        "labels": rows,
    }


def asked(model: Any) -> dict[str, Any]:
    """As ``pixels``, with a question for the model that queries the image."""
    image = {
        "pixel_values": noise(BATCH, 3, *[_size(model.config)] * 2),
        "qformer_input_ids": ids(),
    }
    return {**_with_tokens(model, image), **image}


KINDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    one.__name__: one
    for one in (
        *(text, typed, boxed, codes, channels, spoken),
        *(pixels, sized, tiles, grid, squares, shown, masked, flattened, asked),
        *(speech, frames, wave),
    )
}


def _with_tokens(model: Any, image: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Token ids with as many tokens of the image in each row as it has features."""
    with torch.no_grad():
        owner = model if hasattr(model, "get_image_features") else model.model
        features = owner.get_image_features(**image)
    found = getattr(features, "pooler_output", features)
    found = features.last_hidden_state if found is None else found
    count = sum(one.numel() // one.shape[-1] for one in _tensors(found)) // BATCH
    token = torch.full((BATCH, count), _image_token(model.config))
    plain = ids()
    return {"input_ids": torch.cat([plain[:, :2], token, plain[:, 2:]], 1)}


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    else:
        for one in nested:
            yield from _tensors(one)


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _mels(config: Any) -> int:
    names = ("num_mel_bins", "input_feat_per_channel")
    for part in (config, *(getattr(config, f"{n}_config", None) for n in ("encoder", "audio"))):
        for name in names:
            if getattr(part, name, None) is not None:
                return int(getattr(part, name))
    raise AttributeError(f"{type(config).__name__} has no number of mel bins")


def _image_token(config: Any) -> int:
    for name in (
        "image_token_id",
        "image_token_index",
        "im_token_id",
        "media_placeholder_token_id",
    ):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise AttributeError(f"{type(config).__name__} has no token for an image")


def _vision(config: Any) -> Any:
    thinker = getattr(config, "thinker_config", config)
    return getattr(thinker, "vision_config", None) or getattr(thinker, "vq_config", thinker)


def _size(config: Any) -> int:
    size = getattr(_vision(config), "image_size", 32)
    return size if isinstance(size, int) else 32
