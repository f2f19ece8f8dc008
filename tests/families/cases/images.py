"""Models that see, each with an image for every row."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_CODEBOOK = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "embed_dim": 16,
    "latent_channels": 16,
}
#: Kind of the inputs -> one line a family, with its classes.
FAMILIES = {
    "sized": """
apertus1p5 Apertus1p5ForConditionalGeneration
lighton_ocr LightOnOcrForConditionalGeneration
mistral3 Mistral3ForConditionalGeneration
mistral_large4 MistralLarge4ForConditionalGeneration
""",
    "pixels": """
aria AriaForConditionalGeneration
aya_vision AyaVisionForConditionalGeneration
blip_2 Blip2ForConditionalGeneration
chameleon ChameleonForConditionalGeneration
cohere2_vision Cohere2VisionForConditionalGeneration
deepseek_vl DeepseekVLForConditionalGeneration
florence2 Florence2ForConditionalGeneration
gemma3 Gemma3ForConditionalGeneration
got_ocr2 GotOcr2ForConditionalGeneration
internvl InternVLForConditionalGeneration
janus JanusForConditionalGeneration
llava LlavaForConditionalGeneration
ovis2 Ovis2ForConditionalGeneration
paligemma PaliGemmaForConditionalGeneration
qianfan_ocr QianfanOCRForConditionalGeneration
step3p7 Step3p7ForConditionalGeneration
t5gemma2 T5Gemma2ForConditionalGeneration
video_llava VideoLlavaForConditionalGeneration
vipllava VipLlavaForConditionalGeneration
""",
    "shown": """
blip BlipForConditionalGeneration
git GitForCausalLM
pp_formulanet PPFormulaNetForConditionalGeneration
""",
    "grid": """
cohere_compass CohereCompassForConditionalGeneration
cosmos3_edge Cosmos3EdgeForConditionalGeneration
cosmos3_omni Cosmos3OmniForConditionalGeneration
dots3_note Dots3NoteForConditionalGeneration
ernie4_5_vl_moe Ernie4_5_VLMoeForConditionalGeneration Ernie4_5_VL_MoeForConditionalGeneration
exaone4_5 Exaone4_5_ForConditionalGeneration
glm46v Glm46VForConditionalGeneration
glm4v Glm4vForConditionalGeneration
glm4v_moe Glm4vMoeForConditionalGeneration
glm5_next Glm5NextForConditionalGeneration
glm_ocr GlmOcrForConditionalGeneration
hunyuan_vl HunYuanVLForConditionalGeneration
hy_v4_vl HYV4VLForConditionalGeneration
hyperclovax_vision_v2 HyperCLOVAXVisionV2ForConditionalGeneration
lfm3_vl Lfm3VlForConditionalGeneration
minimax_m3_vl MiniMaxM3SparseForConditionalGeneration
qwen2_5_omni Qwen2_5OmniThinkerForConditionalGeneration
qwen2_5_vl Qwen2_5_VLForConditionalGeneration
qwen2_vl Qwen2VLForConditionalGeneration
qwen3_5 Qwen3_5ForConditionalGeneration
qwen3_5_moe Qwen3_5MoeForConditionalGeneration
qwen3_omni_moe Qwen3OmniMoeThinkerForConditionalGeneration
qwen3_vl Qwen3VLForConditionalGeneration
qwen3_vl_moe Qwen3VLMoeForConditionalGeneration
qwen4_exp Qwen4ExpForConditionalGeneration
video_llama_3 VideoLlama3ForConditionalGeneration
""",
    "tiles": """
idefics2 Idefics2ForConditionalGeneration
idefics3 Idefics3ForConditionalGeneration
llava_next LlavaNextForConditionalGeneration
llava_next_video LlavaNextVideoForConditionalGeneration
llava_onevision LlavaOnevisionForConditionalGeneration
smolvlm SmolVLMForConditionalGeneration
""",
    "squares": """
kimi_k25 Kimi_K25ForConditionalGeneration
paddleocr_vl PaddleOCRVLForConditionalGeneration
""",
    "flattened": """
pix2struct Pix2StructForConditionalGeneration
""",
    "masked": """
idefics IdeficsForVisionText2Text
""",
    "asked": """
instructblip InstructBlipForConditionalGeneration
""",
}

#: Class -> what its config has of its own.
CHANGES: dict[str, dict[str, Any]] = {
    "Apertus1p5ForConditionalGeneration": {
        "vision_config": {
            **_CODEBOOK,
            "codebook_size": 16,
            "attn_resolutions": [],
            "resolution": 16,
        },
        "audio_config": {"codebook_size": 16},
        "image_token_offset": 80,
        "audio_token_offset": 96,
    },
    "MistralLarge4ForConditionalGeneration": {
        "text_config": {
            "num_hidden_layers": 2,
            "layer_types": None,
            "mlp_layer_types": None,
            "indexer_types": None,
            "no_rope_layers": None,
            "kv_source_layers": None,
        }
    },
    "AriaForConditionalGeneration": {"projector_patch_to_query_dict": {"16": 4}},
    "Blip2ForConditionalGeneration": {"image_token_index": 120},
    "ChameleonForConditionalGeneration": {
        "vq_config": {**_CODEBOOK, "num_embeddings": 8},
        "vocabulary_map": {
            "<image>": 120,
            "IMGIMGABZ": 110,
            "IMGIMGACZ": 111,
            "IMGIMGADZ": 112,
            "IMGIMGAEZ": 113,
            "IMGIMGAFZ": 114,
            "IMGIMGAGZ": 115,
            "IMGIMGAHZ": 116,
            "IMGIMGAIZ": 117,
        },
    },
    "Cohere2VisionForConditionalGeneration": {"alignment_intermediate_size": 64},
    "Gemma3ForConditionalGeneration": {"mm_tokens_per_image": 4},
    "JanusForConditionalGeneration": {
        "vq_config": {**_CODEBOOK, "num_embeddings": 32, "projection_dim": 64}
    },
    "T5Gemma2ForConditionalGeneration": {"encoder": {"mm_tokens_per_image": 4}},
    "VipLlavaForConditionalGeneration": {"vision_feature_layers": [-2, -1]},
    "CohereCompassForConditionalGeneration": {
        "text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
    "Dots3NoteForConditionalGeneration": {
        "text_config": {
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
        "audio_config": {"downsample_hidden_size": 16},
    },
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [48, 24],
        }
    },
    "Ernie4_5_VL_MoeForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [48, 24],
        }
    },
    "Glm46VForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        }
    },
    "Glm4vForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        }
    },
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        }
    },
    "Glm5NextForConditionalGeneration": {"text_config": {"qk_rope_head_dim": 0, "head_dim": 0}},
    "GlmOcrForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        }
    },
    "HunYuanVLForConditionalGeneration": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}}
    },
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}
    },
    "Qwen3OmniMoeThinkerForConditionalGeneration": {
        "audio_config": {"downsample_hidden_size": 16, "num_mel_bins": 16},
        "vision_config": {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
    },
    "Qwen4ExpForConditionalGeneration": {
        "text_config": {
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
        }
    },
    "LlavaNextForConditionalGeneration": {"image_grid_pinpoints": [[32, 32]]},
    "LlavaNextVideoForConditionalGeneration": {"image_grid_pinpoints": [[32, 32]]},
    "LlavaOnevisionForConditionalGeneration": {"image_grid_pinpoints": [[32, 32]]},
    "PaddleOCRVLForConditionalGeneration": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}
    },
    "InstructBlipForConditionalGeneration": {"image_token_index": 120},
}
