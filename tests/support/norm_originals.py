"""The classes of transformers that the leaves of norms were written for, and a patch of one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version

import hf_kernel_patch
from hf_kernel_patch import Architecture
from hf_kernel_patch.models import architectures
from tests.support.ops.inputs import F32, draw

WIDTH = 33
EPS = 1e-5


class Norm(NamedTuple):
    """A class of norms: its module, its arguments, its leaf, and since when it is as it is."""

    module: str
    name: str
    given: dict[str, Any]
    leaf: str
    since: str = "4.57"
    gated: bool = False

    @property
    def title(self) -> str:
        own = [str(self.given[name]) for name in ("with_scale", "group_size") if name in self.given]
        return " ".join([self.name, *own])

    def modelling(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")

    def kind(self) -> Any:
        return getattr(self.modelling(), self.name)

    def made(self, dtype: torch.dtype = F32) -> Any:
        """One with a random weight."""
        norm = self.kind()(**self.given)
        if isinstance(getattr(norm, "weight", None), torch.nn.Parameter):
            norm.weight.data = draw((WIDTH,), seed=1, grad=False)
        return norm.to(dtype)


SIZE = {"hidden_size": WIDTH, "eps": EPS}
DIM = {"dim": WIDTH, "eps": EPS}
CPMANT = {"config": transformers.CpmAntConfig(hidden_size=WIDTH, eps=EPS)}
#: Those that the installed transformers has.
EACH = {
    one.title: one
    for one in (
        Norm("t5", "T5LayerNorm", SIZE, "rms_norm.t5"),
        Norm("longt5", "LongT5LayerNorm", SIZE, "rms_norm.t5"),
        Norm("idefics", "IdeficsRMSNorm", SIZE, "rms_norm.t5"),
        Norm("cpmant", "CpmAntLayerNorm", CPMANT, "rms_norm.cpmant"),
        Norm("helium", "HeliumRMSNorm", SIZE, "rms_norm.olmo2"),
        Norm("nemotron_h", "NemotronHRMSNorm", SIZE, "rms_norm.olmo2", "5.23"),
        Norm("moshi", "MoshiRMSNorm", DIM, "rms_norm.moshi"),
        Norm("llama4", "Llama4TextRMSNorm", SIZE, "rms_norm.llama4"),
        Norm("gemma3n", "Gemma3nRMSNorm", {**DIM, "with_scale": True}, "rms_norm.gemma4", "5.5"),
        Norm("gemma3n", "Gemma3nRMSNorm", {**DIM, "with_scale": False}, "rms_norm.gemma4", "5.5"),
        Norm("gemma4", "Gemma4RMSNorm", {**DIM, "with_scale": True}, "rms_norm.gemma4", "5.17"),
        Norm("gemma4", "Gemma4RMSNorm", {**DIM, "with_scale": False}, "rms_norm.gemma4", "5.17"),
        Norm("llama4", "Llama4TextL2Norm", {"eps": EPS}, "rms_norm.nanochat"),
        Norm("nanochat", "NanoChatRMSNorm", {"eps": EPS}, "rms_norm.nanochat", "5.5"),
        Norm("falcon_mamba", "FalconMambaWeightlessRMSNorm", SIZE, "rms_norm.nanochat", "5.17"),
        Norm(
            "deepseek_v4",
            "DeepseekV4UnweightedRMSNorm",
            {"eps": EPS},
            "rms_norm.deepseek_v4",
            "5.17",
        ),
        Norm("inkling2", "Inkling2UnweightedRMSNorm", {"eps": EPS}, "rms_norm.inkling2", "5.24"),
        Norm(
            "qwen4_exp",
            "Qwen4ExpTextRMSNorm",
            {**DIM, "group_size": None},
            "rms_norm.qwen4",
            "5.17",
        ),
        Norm(
            "qwen4_exp", "Qwen4ExpTextRMSNorm", {**DIM, "group_size": 11}, "rms_norm.qwen4", "5.17"
        ),
        Norm(
            "zamba2",
            "Zamba2RMSNormGated",
            {**SIZE, "group_size": 11},
            "rms_norm.gate_first",
            gated=True,
        ),
        Norm(
            *("mamba2", "MambaRMSNormGated"),
            {**SIZE, "group_size": 11},
            *("rms_norm.gate_first", "5.23", True),
        ),
        Norm("qwen3_next", "Qwen3NextRMSNormGated", SIZE, "rms_norm.gated", gated=True),
        Norm(
            *("kimi_linear", "KimiLinearRMSNormGated", SIZE, "rms_norm.gated", "5.23", True),
        ),
        Norm(*("lara_mini", "LaraMiniRMSNormGated", SIZE, "rms_norm.gated", "5.24", True)),
    )
    if Version(transformers.__version__) >= Version(one.since)
}
if Version(transformers.__version__) < Version("5.23"):
    EACH["mamba2 of old"] = Norm(
        "mamba2", "MambaRMSNormGated", SIZE, "rms_norm.gate_first", gated=True
    )


@contextmanager
def patched(norm: Norm, op: str = "rms_norm") -> Iterator[Any]:
    """The report of a patch of the class alone."""
    table = Architecture("own", {f"{norm.name}.forward": norm.leaf}, norm.modelling().__name__)
    hf_kernel_patch.count_calls()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(architectures(), table.name, table)
        with hf_kernel_patch.patched(op, models="own", strict=True) as report:
            yield report


def inputs(norm: Norm, dtype: torch.dtype, shape: tuple[int, ...] = (2, 7, WIDTH)) -> list[Any]:
    """x, and the gate of a gated norm."""
    return [draw(shape, dtype, seed=5 + i) for i in range(2 if norm.gated else 1)]


def outcome(norm: Any, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of inputs and weight."""
    out = norm(*given)
    wanted = [one for one in (*given, *norm.parameters()) if one.requires_grad]
    upstream = draw(tuple(out.shape), seed=9, grad=False).to(out)
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream)] if wanted else [out]
