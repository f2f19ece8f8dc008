"""Whole models whose rotary function is served: the same numbers, in both scopes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel

import hf_kernel_patch
from tests.support.probes import fallbacks, served

pytestmark = pytest.mark.versions

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
IMAGES = {"image_size": 16, "patch_size": 4}
NANO = {
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0, 0.0],
    "sliding_window": 4,
}
#: Family -> what its config has of its own, and how often a forward calls the rotary function.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "glm": ({}, 2),
    "helium": ({}, 2),
    "ernie4_5": ({}, 2),
    "nemotron": ({}, 2),
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, 4),
    "modernbert": ({"global_attn_every_n_layers": 2}, 2),
    "youtu": (LATENT, 2),
    "gemma3n_text": (NANO, 4),
    "dinov3_vit": (IMAGES, 2),
    "pixtral": (IMAGES, 2),
}
#: Names that a family's config has not.
UNLIKE = {"gptj": ("num_key_value_heads", "head_dim"), "dinov3_vit": ("head_dim",)}
#: Older versions of the function have no leaf.
SINCE = {"modernbert": "5.5", "youtu": "5.5", "pixtral": "5.5", "gemma3n_text": "5"}


def model_of(family: str) -> Any:
    folder = family.removesuffix("_text")
    if find_spec(f"transformers.models.{folder}") is None or newer(SINCE.get(family, "4")):
        pytest.skip(f"not in transformers {transformers.__version__}")
    torch.manual_seed(0)
    own = {**SIZES, **MODELS[family][0]}
    changes = {name: value for name, value in own.items() if name not in UNLIKE.get(family, ())}
    return AutoModel.from_config(AutoConfig.for_model(family, **changes)).eval()


def newer(version: str) -> bool:
    """Whether a version comes after the one that is installed."""
    here = tuple(map(int, transformers.__version__.split(".")[:2]))
    return tuple(map(int, (version + ".0").split(".")[:2])) > here


def run(model: Any) -> list[torch.Tensor]:
    """The last hidden states, and the gradients of all parameters."""
    model.zero_grad()
    if model.main_input_name == "pixel_values":
        generator = torch.Generator().manual_seed(1)
        given = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    else:
        given = {"input_ids": torch.arange(2, 16).view(2, 7)}
    states = model(**given)[0]
    states.square().sum().backward()
    return [states.detach(), *gradients(model)]


def gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def globally(model: Any, family: str) -> None:
    name = family.removesuffix("_text")
    hf_kernel_patch.patch_transformers("rope", models=name, backend="torch", strict=True)


def alone(model: Any, family: str) -> None:
    hf_kernel_patch.apply_default_kernels(model, "rope")


SCOPES = pytest.mark.parametrize("scope", [globally, alone])


@SCOPES
@pytest.mark.parametrize("family", MODELS)
def test_a_model_computes_the_same(family: str, scope: Callable[..., None]) -> None:
    model = model_of(family)
    check(lambda: run(model), lambda: scope(model, family), MODELS[family][1])


@SCOPES
def test_the_vision_model_of_qwen2_vl_computes_the_same(scope: Callable[..., None]) -> None:
    """Its images are packed: (S, heads, D)."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 24, "patch_size": 4}
    torch.manual_seed(0)
    model = Qwen2VisionTransformerPretrainedModel._from_config(Qwen2VLVisionConfig(**sizes))
    patches, grid = torch.randn(32, 96), torch.tensor([[1, 4, 4], [1, 4, 4]])

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        found: Any = model(patches, grid)
        states = found if torch.is_tensor(found) else found[0]
        states.square().sum().backward()
        return [
            states.detach(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]

    check(step, lambda: scope(model, "qwen2_vl"), 2)


def check(step: Callable[[], list[torch.Tensor]], patch: Callable[[], None], calls: int) -> None:
    """A step computes the same under the patch, which serves so many calls."""
    eager, *eager_grads = step()
    hf_kernel_patch.count_calls()
    patch()
    try:
        states, *grads = step()
        report = hf_kernel_patch.status()
    finally:
        hf_kernel_patch.unpatch()
    assert torch.equal(states, eager)
    for one, other in zip(grads, eager_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not fallbacks(report)
    assert served(report) == calls
    assert torch.equal(step()[0], eager)
