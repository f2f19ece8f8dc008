"""A tiny config of any architecture: its defaults, with every size that has a name made small."""

from __future__ import annotations

import copy
from typing import Any

VOCABULARY = 128
_NAMED: dict[int | float, str] = {
    # Widths: one for all parts of a model, so that text and vision fit each other.
    64: "hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size decoder_hidden_size "
    "encoder_hidden_size text_hidden_size vision_hidden_size out_hidden_size "
    "output_hidden_size projection_dim projector_hidden_size projection_hidden_size "
    "output_dim word_embed_proj_dim vision_output_dim attention_hidden_size emb_dim "
    "encoder_hidden_dim fusion_hidden_size lru_width backbone_hidden_size codebook_dim "
    "condition_dim mamba_d_ssm adapter_in_dim adapter_out_dim adapter_input_size "
    "audio_hidden_size",
    96: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner mlp_dim dim_ff "
    "ffn_hidden_size intermediate_size_mlp dense_intermediate_size",
    48: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size",
    2: "num_hidden_layers num_layers layers n_layer n_layers depth encoder_layers decoder_layers "
    "num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k decoder_num_hidden_layers "
    "encoder_num_hidden_layers moe_k n_group linear_num_key_heads decoder_num_key_value_heads "
    "encoder_num_key_value_heads num_hidden_groups num_expert_group",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts "
    "linear_num_value_heads decoder_num_attention_heads encoder_num_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts topk_group "
    "first_k_dense_replace num_dense_layers encoder_sparse_step decoder_sparse_step "
    "moe_layer_start_index",
    16: "head_dim mamba_head_dim mamba_d_state ssm_state_size d_kv kv_lora_rank v_head_dim "
    "qk_nope_head_dim linear_key_head_dim linear_value_head_dim attention_head_dim "
    "kv_channels swa_head_dim index_head_dim",
    24: "q_lora_rank",
    8: "mamba_n_heads mamba_num_heads mamba_chunk_size qk_rope_head_dim sliding_window "
    "attention_window_size attention_chunk_size patch_size",
    32: "image_size",
    128: "vocab_size max_position_embeddings n_positions n_ctx max_source_positions "
    "max_target_positions pooler_output_size decoder_vocab_size",
    0.1: "initializer_range init_std initializer_factor",
}
#: Attribute -> the value of it, where the config has one.
SIZES: dict[str, Any] = {name: value for value, names in _NAMED.items() for name in names.split()}
_MORE: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "depth")

_MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
#: Model type -> what its tiny config needs beside, where the names are not enough.
OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **_MAMBA},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "state_size": 16, "chunk_size": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def shrink(kind: Any, changes: dict[str, Any] | None = None) -> Any:
    """A tiny config of the class; ``changes`` go over what the names ask for.

    A change that is a dict goes into the config of that name.
    """
    return _Shrinker().config(kind, changes or {})


def layers_of(config: Any) -> int:
    """How many layers a config has, or that of its text model."""
    part = config.get_text_config()
    return int(getattr(part, _count_of(vars(part), type(part).__name__)))


def with_layers(config: Any, layers: int) -> Any:
    """A copy with the first layers alone; where it has fewer, their kinds are repeated."""
    config = copy.deepcopy(config)
    part = config.get_text_config()
    name, held = _count_of(vars(part), type(part).__name__), layers_of(config)
    for own, value in list(vars(part).items()):
        if isinstance(value, list) and len(value) == held > 1 and own[0] != "_":
            setattr(part, own, [value[place % held] for place in range(layers)])
    setattr(part, name, layers)
    return config


def _count_of(values: dict[str, Any], owner: str) -> str:
    """The name of the number of layers."""
    found = next((name for name in _COUNTS if isinstance(values.get(name), int)), None)
    if found is None:
        raise ValueError(f"layers: a {owner} has no number of layers of a known name")
    return found


class _Shrinker:
    """Special tokens get ids of their own, from the top of the vocabulary down."""

    def __init__(self) -> None:
        self._free = VOCABULARY
        self._tokens: dict[str, int] = {}

    def config(self, kind: Any, changes: dict[str, Any]) -> Any:
        return kind(**self.arguments(kind, kind(), changes))

    def arguments(self, kind: Any, default: Any, changes: dict[str, Any]) -> dict[str, Any]:
        changes = dict(changes)
        values = {name: value for name, value in vars(default).items() if name[0] != "_"}
        given: dict[str, Any] = {}
        for name, value in values.items():
            if hasattr(value, "model_type"):
                inner = changes.pop(name, {})
                if inner is not None:
                    own = self.arguments(type(value), value, inner)
                    given[name] = type(value)(**own)
                else:
                    given[name] = None
            elif (small := self._small(name, value)) is not None:
                given[name] = small
        if "kv_lora_rank" in given:  # latent attention: a key for every head
            given |= {name: 4 for name in ("num_key_value_heads",) if name in given}
            given |= {name: given["qk_rope_head_dim"] for name in ("head_dim",) if name in given}
        if isinstance(values.get("rope_parameters"), dict):
            given["rope_parameters"] = self._rope(values["rope_parameters"], given)
        if values.get("is_encoder_decoder"):
            given["decoder_start_token_id"] = 0
        given |= self._by_layer(values)
        return {**given, **changes}

    @staticmethod
    def _rope(parameters: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Sections of the multimodal rotary embedding that fit the small heads."""
        if len(parameters.get("mrope_section", ())) != 3:
            return parameters
        half = int(given.get("head_dim", 16) * parameters.get("partial_rotary_factor", 1)) // 2
        third = half // 3
        return {**parameters, "mrope_section": [half - 2 * third, third, third]}

    def _small(self, name: str, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _MORE:
            return _MORE[name]
        if name in SIZES and (number or value is None):
            return SIZES[name]
        if number and (
            "dropout" in name or "drop_path" in name or name.endswith(("pdrop", "drop"))
        ):
            return type(value)(0)
        if number and name.endswith(("token_id", "token_index")) and value >= 0:
            return self._token(name)
        return None

    def _token(self, name: str) -> int:
        name = name.removesuffix("_id").removesuffix("_index")
        if name not in self._tokens:
            self._free -= 1
            self._tokens[name] = self._free
        return self._tokens[name]

    @staticmethod
    def _by_layer(values: dict[str, Any]) -> dict[str, Any]:
        """As few layers as show every kind that the default has, and two at least."""
        count = next((name for name in _COUNTS if isinstance(values.get(name), int)), None)
        if count is None:
            return {}
        lists = {
            name: value
            for name, value in values.items()
            if isinstance(value, list) and len(value) == values[count] and len(value) > 1
        }
        lists = {n: v for n, v in lists.items() if all(isinstance(x, str | bool | int) for x in v)}
        lists = {n: v for n, v in lists.items() if len(set(v)) < len(v)}
        if not lists:
            return {}
        kinds = list(dict.fromkeys(zip(*lists.values())))
        kinds += kinds[-1:] * (2 - len(kinds))
        return {count: len(kinds)} | {n: list(v) for n, v in zip(lists, zip(*kinds))}
