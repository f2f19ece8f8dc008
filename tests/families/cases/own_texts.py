"""Decoders of text that need more of their own than smaller sizes."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
#: Kind of the inputs -> one line a family, with its classes.
FAMILIES = {
    "text": """
bamba BambaForCausalLM
codegen CodeGenForCausalLM
cohere_compass CohereCompassForCausalLM
csm CsmDepthDecoderForCausalLM
dbrx DbrxForCausalLM
dory DoryForCausalLM
dots3_note Dots3NoteForCausalLM
gemma3n Gemma3nForCausalLM
gemma4 Gemma4ForCausalLM
gptj GPTJForCausalLM
granitemoehybrid GraniteMoeHybridForCausalLM
inkling2 Inkling2ForCausalLM
inkling2_loop Inkling2LoopForCausalLM
jamba JambaForCausalLM
lfm2_moe Lfm2MoeForCausalLM
mamba2 Mamba2ForCausalLM
mistral4 Mistral4ForCausalLM
phi4_multimodal Phi4MultimodalForCausalLM
qwen4_exp Qwen4ExpForCausalLM
recurrent_gemma RecurrentGemmaForCausalLM
roc_bert RoCBertForCausalLM
xmod XmodForCausalLM
zamba ZambaForCausalLM
zamba2 Zamba2ForCausalLM
zaya ZayaForCausalLM
blt BltForCausalLM
""",
}

#: Class -> what its config has of its own.
CHANGES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "CodeGenForCausalLM": {"rotary_dim": 8},
    "CohereCompassForCausalLM": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "CsmDepthDecoderForCausalLM": {"num_codebooks": 32},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "DoryForCausalLM": {
        "num_hidden_layers": 6,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "n_input_layers": 2,
        "n_output_layers": 2,
        "n_recurrent_layers": 2,
    },
    "Dots3NoteForCausalLM": {
        "per_layer_config": {
            "2": {
                "head_dim": 24,
                "kv_lora_rank": 16,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "q_lora_rank": 24,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            }
        },
        "index_n_heads": 2,
        "index_topk": 8,
    },
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": 96,
    },
    "Gemma4ForCausalLM": {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8},
    "GPTJForCausalLM": {"rotary_dim": 8},
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "Inkling2ForCausalLM": {
        "unpadded_vocab_size": 128,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "sliding_window_size": 8,
    },
    "Inkling2LoopForCausalLM": {
        "unpadded_vocab_size": 128,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "sliding_window_size": 8,
    },
    "JambaForCausalLM": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "Mamba2ForCausalLM": {"num_heads": 8, "state_size": 16, "chunk_size": 8},
    "Mistral4ForCausalLM": {"head_dim": 16},
    "Phi4MultimodalForCausalLM": {
        "vision_config": {"crop_size": 32},
        "audio_config": {
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
            "nemo_conv_channels": 16,
            "num_blocks": 2,
        },
    },
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 64,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
    },
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "RoCBertForCausalLM": {
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
        "shape_vocab_size": 32,
        "pronunciation_vocab_size": 32,
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
        "num_key_value_heads": 4,
    },
    "Zamba2ForCausalLM": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_key_value_heads": 4,
        "mamba_d_state": 16,
        "chunk_size": 8,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "attention_hidden_size": 128,
    },
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "BltForCausalLM": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "use_cache": False,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
        "global_config": {},
    },
}
