"""Layers and attentions by themselves, of models that see and hear: what no table describes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import hf_kernel_patch
from hf_kernel_patch.models import Architecture, architectures
from tests.support.tiny import largest_error

KERNELS = {"residual_norm": "torch_fused_add_rmsnorm", "qk_norm_rope": "torch_fused_qk_norm_rope"}
HIDDEN, SIZE, TOKENS = 32, 8, 5
_TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": SIZE,
    "layer_norm_eps": 1e-6,
}
_VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": SIZE,
    "hidden_act": "silu",
    "out_hidden_size": HIDDEN,
    "num_hidden_layers": 1,
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def angles(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    turns = draw(*shape, SIZE // 2, seed=1).repeat_interleave(2, -1)
    turns = torch.cat((turns[..., ::2], turns[..., ::2]), -1)
    return turns.cos(), turns.sin()


def packed() -> dict[str, Any]:
    """Two images, one after the other."""
    return {
        "hidden_states": draw(TOKENS, HIDDEN).requires_grad_(),
        "cu_seqlens": torch.tensor([0, 2, TOKENS], dtype=torch.int32),
        "position_embeddings": angles(TOKENS),
    }


def batched() -> dict[str, Any]:
    return {
        "hidden_states": draw(2, TOKENS, HIDDEN).requires_grad_(),
        "position_embeddings": angles(1, TOKENS),
        "attention_mask": None,
    }


def with_sound() -> dict[str, Any]:
    mask = torch.tensor([[True, True, False, False, True]] * 2)
    return {**batched(), "audio_token_mask": mask}


@dataclass(frozen=True)
class Part:
    """One class, what it is called with, and what a call serves."""

    model: str
    name: str
    rule: str
    inputs: Callable[[], dict[str, Any]]
    config_class: str
    config: dict[str, Any] = field(default_factory=dict)
    served: int = 1
    fallbacks: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.name}-{self.inputs.__name__}{'-'.join(map(str, ('', *self.config.values())))}"
        )

    @property
    def module(self) -> str:
        return f"transformers.models.{self.model}.modeling_{self.model}"

    def make(self) -> Any:
        """The module with random weights."""
        sizes = _VISION if self.inputs is packed else _TEXT
        home = importlib.import_module(self.module.replace(".modeling_", ".configuration_"))
        config = getattr(home, self.config_class)(**{**sizes, **self.config})
        config._attn_implementation = "eager"
        kind = getattr(importlib.import_module(self.module), self.name)
        try:
            made = kind(config, 0)
        except TypeError:
            made = kind(config)
        for seed, parameter in enumerate(made.parameters()):
            parameter.data = draw(*parameter.shape, seed=seed) / HIDDEN**0.5
        return made


PARTS = [
    # The norm inside of the MLP's call.
    Part("qwen2_5_vl", "Qwen2_5_VLVisionBlock", "residual_norm", packed, "Qwen2_5_VLVisionConfig"),
    Part("glm4v", "Glm4vVisionBlock", "residual_norm", packed, "Glm4vVisionConfig"),
    # Norms of (S, heads, D), and a rotary function that rotates in float32.
    Part("glm_ocr", "GlmOcrVisionAttention", "qk_norm_rope", packed, "GlmOcrVisionConfig"),
    Part("lfm3_vl", "Lfm3VlVisionAttention", "qk_norm_rope", packed, "Lfm3VlVisionConfig"),
    # Pairs of neighbours are rotated.
    Part("pe_audio", "PeAudioEncoderAttention", "qk_norm_rope", batched, "PeAudioEncoderConfig"),
    # The norm under a condition.
    Part("molmo2", "Molmo2DecoderLayer", "residual_norm", batched, "Molmo2TextConfig"),
    Part(
        "molmo2",
        "Molmo2DecoderLayer",
        "residual_norm",
        batched,
        "Molmo2TextConfig",
        {"norm_after": True},
        served=0,
    ),
    *(
        Part(
            "higgs_audio_v2",
            "HiggsAudioV2DecoderLayer",
            "residual_norm",
            inputs,
            "HiggsAudioV2Config",
            served=served,
        )
        for inputs, served in ((batched, 1), (with_sound, 0))
    ),
    # Norms that are asked for, of heads or of all heads at once.
    Part("molmo2", "Molmo2Attention", "qk_norm_rope", batched, "Molmo2TextConfig"),
    Part(
        "molmo2",
        "Molmo2Attention",
        "qk_norm_rope",
        batched,
        "Molmo2TextConfig",
        {"qk_norm_type": "olmo"},
        served=0,
        fallbacks={"the norms of q and k are not asked for": 1},
    ),
]


def exists(part: Part) -> bool:
    try:
        importlib.import_module(part.module)
    except ImportError:
        return False
    return True


HERE = [part for part in PARTS if exists(part)]


def test_there_are_some_here() -> None:
    assert HERE


def outcome(module: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Output and gradients."""
    found = module(**inputs)
    output = found[0] if isinstance(found, tuple) else found
    leaves = {"input": inputs["hidden_states"], **dict(module.named_parameters())}
    grads = torch.autograd.grad(
        output.square().sum(), [*leaves.values()], allow_unused=True, materialize_grads=True
    )
    return {"output": output.detach(), **dict(zip(leaves, grads))}


@pytest.mark.parametrize("part", HERE, ids=str)
def test_a_part_gives_what_it_gives_as_it_is(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Architecture(part.model, {f"{part.name}.forward": part.rule}, part.module)
    monkeypatch.setitem(architectures(), part.model, table)
    module, inputs = part.make(), part.inputs()
    eager = outcome(module, inputs)
    with hf_kernel_patch.patched(KERNELS[part.rule], models=part.model, strict=True) as report:
        inside = outcome(module, inputs)
        (row,) = report
        assert (row.served, row.fallbacks) == (part.served, part.fallbacks)
    assert torch.equal(inside["output"], eager["output"])
    used = [name for name in eager if eager[name].any()]
    assert len(used) > 3
    assert largest_error({n: inside[n] for n in used}, {n: eager[n] for n in used}) < 3e-6
    after = outcome(module, inputs)
    assert all(torch.equal(after[name], eager[name]) for name in eager)
