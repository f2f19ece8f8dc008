"""The decoder layer: the sum of residual and attention and its norm in one op.

Where nothing is trained and a token is decoded, what does not depend on the cache is replayed
from CUDA graphs (``decoding.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hf_kernel_patch.recognition.form import Form, register_form
from hf_kernel_patch.recognition.leaves.norms import Norm, norm_arguments, norms_in
from hf_kernel_patch.recognition.rules.attention import modeling_of
from hf_kernel_patch.recognition.site import Site

_TEXT = """
def forward(self, {parameters}, **kwargs):
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, {passed}, **kwargs)
{attended}
    residual = hidden_states
    hidden_states = self.{norm}(hidden_states)
{fed}
    return hidden_states
"""
#: Parameters after hidden_states -> their defaults; transformers 5 in two orders, then 4.
_PARAMETERS: tuple[dict[str, Any], ...] = tuple(
    dict.fromkeys(names.split()) | ({"use_cache": False} if "use_cache" in names else {})
    for names in (
        "attention_mask position_ids past_key_values use_cache position_embeddings",
        "position_embeddings attention_mask position_ids past_key_values",
        "attention_mask position_ids past_key_values use_cache cache_position position_embeddings",
        "position_embeddings attention_mask position_ids past_key_values cache_position",
    )
)
_ADD = "    hidden_states = residual + hidden_states"
_MLP = "    hidden_states = self.mlp(hidden_states)\n"
_MAY_BE_TUPLE = """\
    if isinstance(hidden_states, tuple):
        hidden_states, _ = hidden_states
"""


class Layer(NamedTuple):
    """What a text does around its modules.

    ``after_attention`` and ``after_mlp`` take the layer and the output of its attention or MLP, and
    give what is added to the residual.
    """

    parameters: dict[str, Any]
    norm: str = "post_attention_layernorm"
    after_attention: Callable[[Any, Any], Any] | None = None
    after_mlp: Callable[[Any, Any], Any] | None = None

    def add_and_norm(
        self, layer: Any, site: Site, known: dict[type, Norm], x: Any, residual: Any
    ) -> tuple[Any, Any]:
        """The next residual and its norm, from attention's output."""
        if self.after_attention is not None:
            x = self.after_attention(layer, x)
        norm = getattr(layer, self.norm)
        arguments, why_not = norm_arguments(norm, known)
        if site.declines(x, residual, *arguments, unless=why_not):
            residual = residual + x
            return residual, norm(residual)
        total, normed = site.op(x, residual, *arguments)
        return total, normed

    def feed(self, layer: Any, x: Any, residual: Any) -> Any:
        """The MLP or the experts, and the second sum."""
        x = layer.mlp(x)
        x = x[0] if isinstance(x, tuple) else x
        return residual + (x if self.after_mlp is None else self.after_mlp(layer, x))


def _adapter(spec: Layer) -> Callable[[Site], Callable[..., Any]]:
    def adapter(site: Site) -> Callable[..., Any]:
        import torch

        original, names = site.original, tuple(spec.parameters)
        known = norms_in(modeling_of(original))
        decode: Any = None
        if site.kernel.device == "cuda":
            from hf_kernel_patch.recognition.rules.decoding import decoder

            decode = decoder(site, spec)

        def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if not site.active:
                return original(self, hidden_states, *args, **kwargs)
            given = {**spec.parameters, **dict(zip(names, args)), **kwargs}
            if decode is not None and not torch.compiler.is_compiling():
                decoded = decode(self, hidden_states, given)
                if decoded is not None:
                    return decoded
            x, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
            residual, x = spec.add_and_norm(self, site, known, x, hidden_states)
            return spec.feed(self, x, residual)

        return forward

    return adapter


def _parameter(name: str, default: Any, v4: bool) -> str:
    # In transformers 4 the layers that take the position embeddings first demand them.
    return name if v4 and name == "position_embeddings" else f"{name}={default}"


def _form(
    name: str,
    attended: str = _ADD,
    fed: str = _MLP + _ADD,
    optional: str = "",
    **spec: Any,
) -> None:
    """A form in all orders of parameters; ``optional`` is what some versions do after the MLP."""
    variants = {}
    for parameters in _PARAMETERS:
        layer = Layer(parameters, **spec)
        v4 = "cache_position" in parameters and next(iter(parameters)) == "position_embeddings"
        for extra in {"", optional}:
            text = _TEXT.format(
                parameters=", ".join(
                    ["hidden_states", *(_parameter(*item, v4) for item in parameters.items())]
                ),
                passed=", ".join(f"{key}={key}" for key in parameters),
                attended=attended,
                norm=layer.norm,
                fed=fed.replace(_MLP, _MLP + extra),
            )
            variants[text] = _adapter(layer)
    register_form(Form(name, "add_rms_norm", variants))


_form("decoder_layer.pre_norm", optional=_MAY_BE_TUPLE)
_form(
    "decoder_layer.scaled",
    attended=f"{_ADD} * self.residual_multiplier",
    fed=f"{_MLP}{_ADD} * self.residual_multiplier",
    after_attention=lambda layer, x: x * layer.residual_multiplier,
    after_mlp=lambda layer, x: x * layer.residual_multiplier,
)
_form(
    "decoder_layer.dropout",
    attended=_ADD.replace("+ hidden_states", "+ self.resid_attn_dropout(hidden_states)"),
    fed=_MLP + _ADD.replace("+ hidden_states", "+ self.resid_mlp_dropout(hidden_states)"),
    after_attention=lambda layer, x: layer.resid_attn_dropout(x),
    after_mlp=lambda layer, x: layer.resid_mlp_dropout(x),
)
_form(
    "decoder_layer.four_norms",
    attended=f"    hidden_states = self.post_attention_layernorm(hidden_states)\n{_ADD}",
    fed=f"{_MLP}    hidden_states = self.post_feedforward_layernorm(hidden_states)\n{_ADD}",
    norm="pre_feedforward_layernorm",
    after_attention=lambda layer, x: layer.post_attention_layernorm(x),
    after_mlp=lambda layer, x: layer.post_feedforward_layernorm(x),
)
