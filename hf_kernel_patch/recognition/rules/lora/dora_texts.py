"""The code of DoRA for linear layers, as PEFT has had it since 0.17."""

from __future__ import annotations

from functools import cache

from hf_kernel_patch.recognition.source import canonical

_VARIANT = """
def forward(module, active_adapter, x, result{more}):
    lora_A = module.lora_A[active_adapter]
    lora_B = module.lora_B[active_adapter]
    dropout = module.lora_dropout[active_adapter]
    scaling = module.scaling[active_adapter]
    if isinstance(dropout, nn.Identity) or not module.training:
        base_result = result
    else:
        x = dropout(x)
        base_result = None
    result = result + module.lora_magnitude_vector[active_adapter](
        x,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=scaling,
        base_layer=module.get_base_layer(),
        base_result=base_result,{name}
    )
    return result
"""
_LAYER = """
def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None{more}):
    {product}
    magnitude = self.weight
    weight = dequantize_module_weight(base_layer)
    weight = weight.to(x.dtype)
    weight_norm = self.get_weight_norm({norm})
    weight_norm = weight_norm.detach()
    mag_norm_scale = (magnitude / weight_norm).view(1, -1)
    lora_result = lora_B(lora_A(x))
    bias = None
    if base_result is not None:
        bias = base_layer.bias
        if bias is not None:
            base_result = base_result - bias
    else:
        base_result = F.linear(x, transpose(weight, self.fan_in_fan_out))
    result_dora = (mag_norm_scale - 1) * base_result + mag_norm_scale * lora_result * scaling
    return result_dora
"""
_NORM = """
def get_weight_norm(self, weight, lora_weight, scaling{more}):
    weight = transpose(weight, self.fan_in_fan_out)
    weight = weight + scaling * lora_weight
    weight_norm = torch.linalg.norm(weight, dim=1).to(weight.dtype)
    return weight_norm
"""
_EYE = """x_eye = torch.eye(lora_A.weight.shape[1], device=lora_A.weight.device, dtype=x.dtype)
    lora_weight = lora_B(lora_A(x_eye)).T"""
_CACHED = """lora_weight = self.get_lora_weight(
        lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name
    )
    lora_weight = lora_weight.to(x.dtype)"""
_BY_NAME = """
        weight=weight, lora_weight=lora_weight.detach(), scaling=scaling, adapter_name=adapter_name
    """


@cache
def texts() -> frozenset[str]:
    """The canonical text of each function, in each version."""
    named = ', adapter_name="default"'
    found = [
        _VARIANT.format(more="", name=""),
        _VARIANT.format(more=", **kwargs", name=""),
        _VARIANT.format(more=", **kwargs", name="\n        adapter_name=active_adapter,"),
        _LAYER.format(more="", product=_EYE, norm="weight, lora_weight.detach(), scaling"),
        _LAYER.format(more=named, product=_CACHED, norm=_BY_NAME),
        _NORM.format(more=""),
        _NORM.format(more=", adapter_name=None"),
    ]
    return frozenset(map(canonical, found))
