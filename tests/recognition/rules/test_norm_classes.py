"""Norms that a class makes of other code than RMSNorm's are no places for a rule."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hf_kernel_patch.recognition import known

WHY = "the norm is a {}, which is not a norm of a known leaf"


class Doubled(nn.Module):
    def __init__(self, size: int):
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def make(size: int) -> nn.Module:
    return LlamaRMSNorm(size)


class OfTorch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x = x + y
        return self.norm(x)


class OfThisModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm: nn.Module = Doubled(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.norm(x + y)


class OfEither(nn.Module):
    def __init__(self, large: bool) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8) if large else nn.Identity()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x = x + y
        x = self.norm(x)
        return x


class OfBase(OfTorch):
    def __init__(self) -> None:
        super().__init__()
        self.other_norm = LlamaRMSNorm(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x = x + y
        x = self.norm(x)
        return x


class OfHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = LlamaRMSNorm(8), nn.LayerNorm(8)
        self.q_layernorm = LlamaRMSNorm(8)
        self.k_layernorm = nn.LayerNorm(8)

    def forward(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        q = self.q_layernorm(q).transpose(1, 2)
        k = self.k_layernorm(k).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k


@pytest.mark.parametrize(
    ("owner", "rule", "written"),
    [
        (OfTorch, "residual_norm", "nn.LayerNorm"),
        (OfThisModule, "residual_norm", "Doubled"),
        (OfEither, "residual_norm", "nn.Identity"),
        (OfBase, "residual_norm", "nn.LayerNorm"),
        (OfHeads, "qk_norm_rope", "nn.LayerNorm"),
    ],
)
def test_a_norm_that_no_op_serves_is_no_place(owner: Any, rule: str, written: str) -> None:
    reason = known()[rule].why_not(owner.forward, owner)
    assert reason is not None
    assert WHY.format(written) in reason


class Unsaid(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x = x + y
        return self.norm(x)


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = make(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x = x + y
        return self.norm(x)


class ByLocalName(nn.Module):
    def __init__(self, LayerNorm: Any = LlamaRMSNorm) -> None:
        super().__init__()
        self.norm = LayerNorm(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x = x + y
        return self.norm(x)


class OneOfTwo(nn.Module):
    def __init__(self, large: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8) if large else LlamaRMSNorm(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x = x + y
        return self.norm(x)


class OnePathOfTwo(nn.Module):
    def __init__(self, large: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        if large:
            self.norm = LlamaRMSNorm(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x = x + y
        return self.norm(x)


class ManyTargets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.norm, self.other = (LlamaRMSNorm(8) for _ in range(2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x = x + y
        return self.norm(x)


class Overriding(OfTorch):
    def __init__(self) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x = x + y
        return self.norm(x)


@pytest.mark.parametrize(
    "owner",
    [Unsaid, ByFunction, ByLocalName, OneOfTwo, OnePathOfTwo, ManyTargets, Overriding],
)
def test_what_the_class_does_not_say_is_decided_at_the_call(owner: Any) -> None:
    assert known()["residual_norm"].why_not(owner.forward, owner) is None


def test_a_class_that_somebody_has_patched_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known()["residual_norm"].why_not(OfTorch.forward, OfTorch) is not None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 3 * x

    monkeypatch.setattr(nn.LayerNorm, "forward", forward)
    assert known()["residual_norm"].why_not(OfTorch.forward, OfTorch) is None


def test_a_class_of_somebody_else_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("LayerNorm", (Doubled,), {"__module__": "somebody.else"})
    monkeypatch.setattr("tests.recognition.rules.test_norm_classes.Doubled", other)
    assert known()["residual_norm"].why_not(OfThisModule.forward, OfThisModule) is None


@pytest.mark.parametrize(
    ("model", "name", "written"),
    [
        ("starcoder2", "Starcoder2DecoderLayer", "nn.LayerNorm"),
        ("vit", "ViTLayer", "nn.LayerNorm"),
        ("nemotron", "NemotronDecoderLayer", "NemotronLayerNorm1P"),
    ],
)
def test_layers_of_transformers(model: str, name: str, written: str) -> None:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    owner = getattr(module, name)
    reason = known()["residual_norm"].why_not(owner.forward, owner)
    assert reason is not None
    assert WHY.format(written) in reason
