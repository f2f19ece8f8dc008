"""Encoders with decoders, models that hear, and those that are asked with text alone."""

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
_CODEC = {
    "hidden_size": 64,
    "num_filters": 8,
    "num_hidden_layers": 2,
    "upsampling_ratios": [2, 2],
    "codebook_size": 64,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "upsample_groups": 8,
    "num_quantizers": 4,
    "num_semantic_quantizers": 1,
}
#: Kind of the inputs -> one line a family, with its classes.
FAMILIES = {
    "text": """
audioflamingo3 AudioFlamingo3ForConditionalGeneration
bart BartForConditionalGeneration
bigbird_pegasus BigBirdPegasusForConditionalGeneration
blenderbot BlenderbotForConditionalGeneration
blenderbot_small BlenderbotSmallForConditionalGeneration
deepseek_vl_hybrid DeepseekVLHybridForConditionalGeneration
emu3 Emu3ForConditionalGeneration
evolla EvollaForProteinText2Text
fsmt FSMTForConditionalGeneration
fun_asr_nano FunAsrNanoForConditionalGeneration
gemma4 Gemma4ForConditionalGeneration
gemma4_unified Gemma4UnifiedForConditionalGeneration
glmasr GlmAsrForConditionalGeneration
granite4_vision Granite4VisionForConditionalGeneration
granite_docling GraniteDoclingForConditionalGeneration
granite_speech GraniteSpeechForConditionalGeneration
granite_speech_plus GraniteSpeechPlusForConditionalGeneration
inkling2 Inkling2ForConditionalGeneration
inkling2_loop Inkling2LoopForConditionalGeneration
kosmos2_5 Kosmos2_5ForConditionalGeneration
led LEDForConditionalGeneration
lfm2_vl Lfm2VlForConditionalGeneration
longt5 LongT5ForConditionalGeneration
m2m_100 M2M100ForConditionalGeneration
mbart MBartForConditionalGeneration
minicpm_ocr MiniCPMOcrForConditionalGeneration
minicpmv4_6 MiniCPMV4_6ForConditionalGeneration
minicpmv4_7 MiniCPMV4_7ForConditionalGeneration
mllama MllamaForConditionalGeneration
moss_transcribe_diarize MossTranscribeDiarizeForConditionalGeneration
mt5 MT5ForConditionalGeneration
muse_glimmer MuseGlimmerForConditionalGeneration
muse_spark MuseSparkForConditionalGeneration
musicflamingo MusicFlamingoForConditionalGeneration
mvp MvpForConditionalGeneration
nemotron3_5_transcribe Nemotron3_5TranscribeForConditionalGeneration
nllb_moe NllbMoeForConditionalGeneration
omniasr OmniASRForConditionalGeneration
pegasus PegasusForConditionalGeneration
pegasus_x PegasusXForConditionalGeneration
plbart PLBartForConditionalGeneration
pop2piano Pop2PianoForConditionalGeneration
prophetnet ProphetNetForConditionalGeneration
qwen2_audio Qwen2AudioForConditionalGeneration
qwen3_asr Qwen3ASRForConditionalGeneration
switch_transformers SwitchTransformersForConditionalGeneration
t5 T5ForConditionalGeneration
t5gemma T5GemmaForConditionalGeneration
umt5 UMT5ForConditionalGeneration
unlimited_ocr UnlimitedOcrForConditionalGeneration
vibevoice VibeVoiceForConditionalGeneration
vibevoice_asr VibeVoiceAsrForConditionalGeneration
voxtral VoxtralForConditionalGeneration
deepseek_ocr2 DeepseekOcr2ForConditionalGeneration
seamless_m4t SeamlessM4TForTextToText
seamless_m4t_v2 SeamlessM4Tv2ForTextToText
glm_image GlmImageForConditionalGeneration
""",
    "wave": """
moonshine_streaming MoonshineStreamingForConditionalGeneration
moonshine MoonshineForConditionalGeneration
""",
    "frames": """
speech_to_text Speech2TextForConditionalGeneration
canary CanaryForConditionalGeneration
cohere_asr CohereAsrForConditionalGeneration
""",
    "speech": """
whisper WhisperForConditionalGeneration
""",
    "typed": """
molmo2 Molmo2ForConditionalGeneration
""",
    "boxed": """
udop UdopForConditionalGeneration
""",
    "codes": """
musicgen MusicgenForCausalLM
musicgen_melody MusicgenMelodyForCausalLM
""",
    "channels": """
kyutai_speech_to_text KyutaiSpeechToTextForConditionalGeneration
""",
    "spoken": """
dia DiaForConditionalGeneration
""",
}

#: Class -> what its config has of its own.
CHANGES: dict[str, dict[str, Any]] = {
    "DeepseekVLHybridForConditionalGeneration": {
        "high_res_vision_config": {
            "output_channels": 16,
            "global_attn_indexes": [1],
            "window_size": 2,
        }
    },
    "Emu3ForConditionalGeneration": {
        "vq_config": {**_CODEBOOK, "codebook_size": 8},
        "vocabulary_map": {
            "<image>": 120,
            "<|visual token 000000|>": 110,
            "<|visual token 000001|>": 111,
            "<|visual token 000002|>": 112,
            "<|visual token 000003|>": 113,
            "<|visual token 000004|>": 114,
            "<|visual token 000005|>": 115,
            "<|visual token 000006|>": 116,
            "<|visual token 000007|>": 117,
        },
    },
    "FSMTForConditionalGeneration": {"src_vocab_size": 128, "tgt_vocab_size": 128},
    "FunAsrNanoForConditionalGeneration": {"adaptor_config": {"intermediate_size": 16}},
    "Gemma4ForConditionalGeneration": {
        "text_config": {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
    },
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "image_grid_pinpoints": [[32, 32]],
        "downsample_rate": "1/2",
    },
    "Inkling2ForConditionalGeneration": {
        "text_config": {
            "unpadded_vocab_size": 128,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "sliding_window_size": 8,
        },
        "vision_config": {"projection_hidden_dim": 64},
    },
    "Inkling2LoopForConditionalGeneration": {
        "text_config": {
            "unpadded_vocab_size": 128,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "sliding_window_size": 8,
        },
        "vision_config": {"projection_hidden_dim": 64},
    },
    "MuseSparkForConditionalGeneration": {
        "text_config": {"moe_intermediate_size": 48},
        "vision_config": {"intermediate_size": 256},
        "audio_config": {
            "hidden_sizes": [16, 16],
            "patch_sizes": [4, 4],
            "depths": [1, 1],
            "num_hidden_layers": 2,
        },
    },
    "VibeVoiceForConditionalGeneration": {
        "audio_config": {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 4},
        "semantic_model_config": {
            "downsampling_ratios": [2, 2],
            "depths": [1, 1, 1],
            "num_filters": 4,
        },
    },
    "VibeVoiceAsrForConditionalGeneration": {
        "acoustic_tokenizer_encoder_config": {
            "downsampling_ratios": [2, 2],
            "depths": [1, 1, 1],
            "num_filters": 4,
        },
        "semantic_tokenizer_encoder_config": {
            "downsampling_ratios": [2, 2],
            "depths": [1, 1, 1],
            "num_filters": 4,
        },
    },
    "DeepseekOcr2ForConditionalGeneration": {
        "vision_config": {
            "sam_config": {
                "downsample_channels": [32, 64],
                "output_channels": 16,
                "global_attn_indexes": [1],
                "window_size": 2,
            },
            "encoder_config": {},
        },
        "text_config": {
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "mlp_layer_types": ["dense", "sparse"],
        },
    },
    "GlmImageForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
            "vision_vocab_size": 128,
        },
        "vq_config": {"num_embeddings": 32, "latent_channels": 16, "embed_dim": 16},
    },
    "MoonshineStreamingForConditionalGeneration": {"num_key_value_heads": 4},
    "MoonshineForConditionalGeneration": {
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
    },
    "CohereAsrForConditionalGeneration": {"encoder_config": {"num_mel_bins": 80}},
    "Molmo2ForConditionalGeneration": {
        "adapter_config": {"vision_feature_layer": [0, 1]},
        "vision_config": {"image_size": [32, 32]},
    },
    "KyutaiSpeechToTextForConditionalGeneration": {"codec_config": _CODEC, "num_codebooks": 4},
    "DiaForConditionalGeneration": {
        "decoder_config": {
            "cross_head_dim": 16,
            "cross_num_key_value_heads": 2,
            "cross_num_attention_heads": 4,
            "cross_hidden_size": 64,
        }
    },
}
