"""The ways to run a model: as it is, under each peer, compiled, and patched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.workloads.peers import PACKAGES
from hf_kernel_patch.devices import missing_package


@dataclass(frozen=True)
class Variant:
    """What to do to a process and its model."""

    liger: bool = False
    ours: bool = False
    compiled: bool = False
    #: The implementation of transformers' experts; None, its default.
    experts: str | None = None
    only_moe: bool = False
    #: One CUDA graph of a bare forward of one token, without generate.
    graph: bool = False
    #: generate with a forward that computes nothing.
    loop: bool = False
    #: The commands that measure it.
    kinds: tuple[str, ...] = ("e2e", "decode")


VARIANTS: dict[str, Variant] = {
    # On a model with experts: the loop over them, as the modelling code has it.
    "eager": Variant(experts="eager"),
    "grouped_mm": Variant(only_moe=True),
    "liger": Variant(liger=True),
    "compile": Variant(compiled=True, kinds=("e2e",)),
    # generate compiles the steps by itself where the cache is static.
    "static": Variant(compiled=True, kinds=("decode",)),
    "graph": Variant(graph=True, kinds=("decode",)),
    "loop": Variant(loop=True, kinds=("decode",)),
    "ours": Variant(ours=True),
    "ours+compile": Variant(ours=True, compiled=True, kinds=("e2e",)),
    "ours+static": Variant(ours=True, compiled=True, kinds=("decode",)),
}


def names(kind: str) -> list[str]:
    """The variants that a command measures: "e2e" or "decode"."""
    return [name for name, variant in VARIANTS.items() if kind in variant.kinds]


def absent(name: str, is_moe: bool, device: str) -> str | None:
    """Why a variant is not measured, or None."""
    variant = VARIANTS[name]
    if variant.only_moe and not is_moe:
        return "the model has no experts"
    if variant.graph and device != "cuda":
        return "CUDA graphs need a CUDA device"
    if variant.liger and missing_package(PACKAGES["liger"]):
        return "liger_kernel is not installed"
    if variant.liger and device == "cpu":
        return "liger_kernel has no kernels for a CPU"
    return None


def before_building(
    variant: Variant, model_type: str, include: str, loss_left: bool
) -> dict[str, Any]:
    """Patch the process, before a model is built; what there is to say about it.

    With ``loss_left`` the loss stays transformers' own.
    """
    if variant.liger:
        from liger_kernel.transformers import monkey_patch

        options = {"fused_linear_cross_entropy": False} if loss_left else {}
        getattr(monkey_patch, f"apply_liger_kernel_to_{model_type}")(**options)
    if variant.ours:
        import hf_kernel_patch

        exclude = ("linear_cross_entropy",) if loss_left else ()
        report = hf_kernel_patch.patch_transformers(include, exclude=exclude, models=model_type)
        return {"patch": report}
    return {}


def compile_model(model: Any, loss_left: bool) -> None:
    """torch.compile the model in place; with ``loss_left`` all but its head and loss."""
    (model.model if loss_left else model).compile()
