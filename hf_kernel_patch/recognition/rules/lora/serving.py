"""What runs in place of a layer's product and those of its adapters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.modules import compiling, hooked
from hf_kernel_patch.recognition.rules.lora.dora import row_norms
from hf_kernel_patch.recognition.rules.lora.layers import Adapter, adapters_of, is_plain
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch


def serve(site: Site) -> Callable[..., torch.Tensor | None]:
    """(layer, x, what else it was given) -> its result with all active adapters, or None.

    None for the original, which then computes all of it.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    op: Callable[..., torch.Tensor] = site.op

    def lora(module: Any, x: torch.Tensor, *given: Any) -> torch.Tensor | None:
        if not site.in_force(module):
            return None
        if compiling() and not site.kernel.traceable:
            site.falls_back(x, module=module)  # before anything that need not be traced
            return None
        layer, adapters = module.base_layer, adapters_of(module, given)
        plain = is_plain(layer)
        if not isinstance(x, torch.Tensor):
            adapters = "the input is no tensor"
        elif not isinstance(adapters, str) and adapters[0].magnitude is not None and not plain:
            adapters = "the layer under DoRA is hooked or of its own kind"
        if isinstance(adapters, str):
            site.falls_back(unless=adapters, module=module)
            return None
        weight, bias = (layer.weight, layer.bias) if plain else (None, None)
        seen, dtype, exact = x, _autocast_dtype(x), adapters
        if dtype is not None:
            seen, weight, bias = seen.to(dtype), _to(weight, dtype), _to(bias, dtype)
            adapters = [
                one._replace(a=one.a.to(dtype), b=one.b.to(dtype), b_bias=_to(one.b_bias, dtype))
                for one in adapters
            ]
        base = None if plain else seen  # which stands for what the layer has not given yet
        reasons = [
            site.why_fallback(one.a, one.b)
            or site.kernel.why_fallback(seen, one.a, one.b, one.scaling, weight, bias, base)
            for one in adapters[1:]
        ]
        first, unless = adapters[0], next(filter(None, reasons), None)
        if site.falls_back(
            seen, first.a, first.b, first.scaling, weight, bias, base, unless=unless, module=module
        ):
            return None
        result = None if plain else layer(x)
        inputs = [_dropped(x, one) for one in exact]
        with _no_autocast(dtype, x):
            scales = [_scale(layer, one) for one in exact]
            return added(seen, adapters, inputs, scales, weight, bias, result)

    def added(
        x: torch.Tensor,
        adapters: list[Adapter],
        inputs: list[torch.Tensor | None],
        scales: list[torch.Tensor | None],
        weight: Any,
        bias: torch.Tensor | None,
        result: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The layer's result, which is given if it has no plain weight, and each adapter's."""
        for one, dropped, scale in zip(adapters, inputs, scales, strict=True):
            options = {"dropped": dropped, "b_bias": one.b_bias, "scale": scale}
            if scale is not None and dropped is not None:
                return dora_dropped(x, one, weight, bias, options)
            if result is None:
                result = op(x, one.a, one.b, one.scaling, weight, bias, **options)
            else:
                result = op(x, one.a, one.b, one.scaling, base=result, **options)
        return result

    def dora_dropped(
        x: torch.Tensor,
        adapter: Adapter,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """DoRA scales what the layer makes of the dropped input, beside its result for x."""
        dropped = options.pop("dropped").to(x.dtype)
        base = F.linear(dropped, weight)
        scaled = op(dropped, adapter.a, adapter.b, adapter.scaling, base=base, **options)
        return F.linear(x, weight, bias) + (scaled - base)

    def _dropped(x: torch.Tensor, adapter: Adapter) -> torch.Tensor | None:
        """What the adapter takes in place of x, where it drops values; the original's own draw.

        The adapter's weights are not rounded for autocast yet: dropout sees their dtype.
        """
        dropout = adapter.dropout
        if type(dropout) is nn.Identity and not hooked(dropout):
            return None
        whole = x.to(adapter.a.dtype)
        dropped: torch.Tensor = dropout(whole)
        return None if dropped is whole else dropped

    return lora


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products of x, if it does."""
    import torch

    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def _no_autocast(dtype: torch.dtype | None, x: torch.Tensor) -> AbstractContextManager[object]:
    """Without autocast, where all that it would round has its dtype already."""
    import torch

    return nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False)


def _scale(layer: Any, adapter: Adapter) -> torch.Tensor | None:
    """By what DoRA multiplies each column of the result."""
    if adapter.magnitude is None:
        return None
    return adapter.magnitude / row_norms(layer.weight, adapter.a, adapter.b, adapter.scaling)


def _to(tensor: Any, dtype: torch.dtype | None) -> Any:
    return tensor if tensor is None or dtype is None else tensor.to(dtype)
