"""Tiny models that see, their real processors made offline, and conversations about images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.support.tiny import SIZES, TRANSFORMERS_5, VOCABULARY

PATCH, SIDE = 8, 32  #: Of the vision towers: pixels of a patch, and of an image's side.
_TEXT: dict[str, Any] = {**SIZES, "max_position_embeddings": 4096, "initializer_range": 0.1}
_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_PATCHES: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": PATCH,
    "window_size": 32,
    "fullatt_block_indexes": [1],
}
_SECTIONS = {"rope_type": "default", "mrope_section": [4, 2, 2]}
_ROTARY = "rope_parameters" if TRANSFORMERS_5 else "rope_scaling"


@dataclass(frozen=True)
class Kind:
    """One of the models: its processor, and how it is told of an image."""

    #: The processor of an image processor and a tokenizer.
    processor: Callable[[Any, Any], Any]
    image_processor: str
    sizes: dict[str, Any]
    #: What the chat template writes where an image is.
    image: str
    #: Attribute of the tokenizer -> its special token.
    tokens: dict[str, str]
    #: Name in the config -> the token whose id it is.
    ids: dict[str, str]
    text: dict[str, Any]
    vision: dict[str, Any]
    config: dict[str, Any]
    tokenizer: str = "PreTrainedTokenizerFast"


class WithoutVideos(transformers.Qwen2_5_VLProcessor):
    """Qwen2.5-VL's, for images alone: its processor of videos would need torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)


def _gemma(images: Any, tokenizer: Any) -> Any:
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _llava(images: Any, tokenizer: Any) -> Any:
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which that strategy leaves out
    )


KINDS: dict[str, Kind] = {
    "qwen2_5_vl": Kind(
        processor=WithoutVideos,
        image_processor="Qwen2VLImageProcessor",
        sizes={"patch_size": PATCH, "min_pixels": SIDE**2 // 2, "max_pixels": 2 * SIDE**2},
        image="<|vision_start|><|image_pad|><|vision_end|>",
        tokens={
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
        },
        ids={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        text={_ROTARY: _SECTIONS | ({"rope_theta": 10000.0} if TRANSFORMERS_5 else {})},
        vision=_PATCHES,
        config={},
        tokenizer="PreTrainedTokenizerFast" if TRANSFORMERS_5 else "Qwen2TokenizerFast",
    ),
    "gemma3": Kind(
        processor=_gemma,
        image_processor="Gemma3ImageProcessor",
        sizes={"size": {"height": SIDE, "width": SIDE}},
        image="<start_of_image>",
        tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        ids={
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>",
        },
        text={
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision={"model_type": "siglip_vision_model", **_TOWER},
        config={"mm_tokens_per_image": 4},
    ),
    "llava": Kind(
        processor=_llava,
        image_processor="CLIPImageProcessor",
        sizes={
            "size": {"shortest_edge": SIDE},
            "crop_size": {"height": SIDE, "width": SIDE},
        },
        image="<image>",
        tokens={"image_token": "<image>"},
        ids={"image_token_index": "<image>"},
        text={"model_type": "llama"},
        vision={"model_type": "clip_vision_model", "projection_dim": 64, **_TOWER},
        config={"image_seq_length": (SIDE // PATCH) ** 2},
    ),
}


def processor(name: str) -> Any:
    """The model's processor, whose tokens are words, and whose images are small ones."""
    kind = KINDS[name]
    special = ["<pad>", "<bos>", "<eos>", "<unk>", *kind.tokens.values()]
    words = [f"w{number}" for number in range(VOCABULARY - len(special))]
    vocabulary = {word: place for place, word in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = getattr(transformers, kind.tokenizer)(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=kind.tokens,
    )
    # Of transformers 5 the ones without torchvision; those of 4 have no suffix and need none.
    of_pillow = kind.image_processor + ("Pil" if TRANSFORMERS_5 else "")
    found = kind.processor(getattr(transformers, of_pillow)(**kind.sizes), fast)
    found.chat_template = (
        "{% for message in messages %}<bos> {% for part in message.content %}"
        "{% if part.type == 'image' %}" + kind.image + "{% else %}{{ part.text }}{% endif %} "
        "{% endfor %}<eos> {% endfor %}"
    )
    return found


def model(name: str, vocabulary: int = VOCABULARY) -> Any:
    """The model with random weights, norms included; the same at every call."""
    kind, tokenizer = KINDS[name], processor(name).tokenizer
    config = AutoConfig.for_model(
        name,
        text_config={**_TEXT, "vocab_size": vocabulary, **kind.text},
        vision_config=kind.vision,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in kind.ids.items()},
        **kind.config,
    )
    torch.manual_seed(0)
    found = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif not parameter.any():
                parameter.normal_(0, 0.1)  # Gemma 3's projector, which nothing initialises
    return found


def conversations(count: int, words: int = 12, images: int = 1) -> list[dict[str, Any]]:
    """Questions about random images of several sizes, and answers of up to so many words."""
    random = numpy.random.default_rng(4)

    def say(least: int, most: int) -> dict[str, str]:
        numbers = random.integers(0, 100, random.integers(least, most + 1))
        return {"type": "text", "text": " ".join(f"w{number}" for number in numbers)}

    def draw() -> Image.Image:
        height, width = random.integers(24, 49, 2)
        return Image.fromarray(random.integers(0, 256, (height, width, 3), numpy.uint8))

    return [
        {
            "images": [draw() for _ in range(images)],
            "messages": [
                {"role": "user", "content": [{"type": "image"}] * images + [say(2, 5)]},
                {"role": "assistant", "content": [say(words // 2, words)]},
            ],
        }
        for _ in range(count)
    ]


def collator(name: str) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Batches of conversations by the processor; padding and images are no labels."""
    own = processor(name)
    image = own.tokenizer.convert_tokens_to_ids(own.tokenizer.image_token)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = own(
            text=[own.apply_chat_template(row["messages"], tokenize=False) for row in rows],
            images=[row["images"] for row in rows],
            padding=True,
            return_tensors="pt",
        )
        labels = batch["input_ids"].clone()
        labels[(labels == own.tokenizer.pad_token_id) | (labels == image)] = -100
        return {**batch, "labels": labels}

    return collate
