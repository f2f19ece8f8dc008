"""``moe(hidden, index, weights, gate_up, down, activation)``: gated experts on routed tokens.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_kernel_patch.kernels import BaseKernel, Op, register_kernel
from hf_kernel_patch.ops._shared.descriptor import TritonKernel
from hf_kernel_patch.ops.moe.experts import flatten

if TYPE_CHECKING:
    import torch

    from hf_kernel_patch.ops.moe.reference import Down, GateUp

#: Why most kernels leave experts with a ``reference.Gating``.
OWN_GATE = "the kernel computes no biases and no gate of the experts' own"


def _why_fallback(
    hidden: torch.Tensor,
    index: torch.Tensor | None,
    weights: torch.Tensor | None,
    gate_up: GateUp,
    down: Down,
    activation: Any = "silu",
) -> str | None:
    """Why these tokens and routes are for the original alone, or None.

    Without a token some of its implementations give what needs no gradient and others do not; of
    routes of other tokens some make an error.
    """
    if not hidden.numel():
        return "there is no token"
    # Before the router has run there are neither index nor weights.
    tokens = hidden.shape[:1]
    if index is not None and not tokens == index.shape[:1] == weights.shape[:1]:  # type: ignore[union-attr]
        return "the routes are of other tokens than the hidden states"
    return None


MOE = Op("moe", _why_fallback)


@register_kernel
class TorchFusedMoE(BaseKernel):
    kernel_id = "torch_fused_moe"
    implements = MOE
    default_on = ("cpu",)
    function = "hf_kernel_patch.ops.moe.torch:moe"
    #: Whether ``activation`` may be a ``reference.Gating``.
    takes_gating = True

    @classmethod
    def why_fallback(
        cls,
        hidden: torch.Tensor,
        index: torch.Tensor | None,
        weights: torch.Tensor | None,
        gate_up: GateUp,
        down: Down,
        activation: Any,
    ) -> str | None:
        import torch

        if torch.is_autocast_enabled(hidden.device.type):
            return "autocast chooses the dtype of the products"
        parts = flatten(gate_up, down)
        if not isinstance(activation, str):
            biases = (activation.gate_up_bias, activation.down_bias)
            parts += [bias for bias in biases if bias is not None]
        if any(one.dtype != hidden.dtype for one in parts):
            return "the hidden states and the experts differ in dtype"
        return _why_fallback(hidden, index, weights, gate_up, down, activation)


@register_kernel
class CudaFusedMoE(TritonKernel):
    kernel_id = "cuda_fused_moe"
    implements = MOE
    function = "hf_kernel_patch.ops.moe.triton:moe"
    #: Rows of an expert on average; for more of them the matrix units have to help.
    most_exact_rows = 64

    @classmethod
    def check_deps(cls) -> str | None:
        from importlib.metadata import PackageNotFoundError, version

        from packaging.version import Version

        try:
            found = version("triton")
        except PackageNotFoundError:  # some builds of it have another name
            found = "3.4"
        if Version(found) < Version("3.4"):
            return f"needs triton 3.4 or later, not {found}"
        return super().check_deps()

    @classmethod
    def why_fallback(
        cls,
        hidden: torch.Tensor,
        index: torch.Tensor | None,
        weights: torch.Tensor | None,
        gate_up: GateUp,
        down: Down,
        activation: Any,
    ) -> str | None:
        if not isinstance(activation, str):
            return OWN_GATE
        if why := TorchFusedMoE.why_fallback(hidden, index, weights, gate_up, down, activation):
            return why
        if any(
            one.device != hidden.device or not one.is_contiguous() for one in flatten(gate_up, down)
        ):
            return "the experts are on another device or not contiguous"
        if index is not None and index.numel() >= 1 << 31:
            return "more than 2147483647 pairs of token and expert"
        if index is not None and index.numel() > cls.most_exact_rows * len(down):
            import torch

            exact = torch.get_float32_matmul_precision() == "highest"
            if hidden.is_cuda and hidden.dtype == torch.float32 and exact:
                return "exact float32 products of many rows, which were not measured to pay"
        return None


@register_kernel
class NpuFusedMoE(BaseKernel):
    kernel_id = "npu_fused_moe"
    implements = MOE
    device = "npu"
    backend = "npu"
    default_on = ("npu",)
    requires = ("torch", "torch_npu")
    function = "hf_kernel_patch.ops.moe.npu:moe"

    @classmethod
    def why_fallback(
        cls,
        hidden: torch.Tensor,
        index: torch.Tensor | None,
        weights: torch.Tensor | None,
        gate_up: GateUp,
        down: Down,
        activation: Any,
    ) -> str | None:
        if not isinstance(activation, str):
            return OWN_GATE
        if activation != "silu":
            return f"npu_swiglu computes silu, not {activation}"
        import torch

        experts = flatten(gate_up, down)
        cast = torch.is_autocast_enabled("npu")
        if not cast and any(one.dtype != hidden.dtype for one in experts):
            return "the hidden states and the experts differ in dtype"
        if any(one.device != hidden.device or not one.is_contiguous() for one in experts):
            return "the experts are on another device or not contiguous"
        if len(down) > 1024 or any(size >= 65536 for one in experts for size in one.shape[-2:]):
            return "npu_grouped_matmul takes 1024 experts and widths under 65536"
        if index is not None and (index.numel() >= 16777215 or index.shape[-1] > 512):
            return "npu_moe_token_permute takes 512 experts a token and 16777214 pairs"
        return _why_fallback(hidden, index, weights, gate_up, down, activation)
