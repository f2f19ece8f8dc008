"""Families that are left out, and single classes of others, each with the reason."""

SKIPPED = {
    "fast_vlm": "its vision tower needs the package timm",
    "gemma4_assistant": "drafts for another model, whose keys and values it needs; it has no loss",
    "gemma4_unified_assistant": "as gemma4_assistant",
    "gradium_phonon_tts": "is trained on latents of sound by a flow, not on tokens",
    "higgs_audio_v2": "has a loss for codes of sound alone, where its processor put them",
    "instructblipvideo": "as instructblip, which is run, with the frames of a video",
    "perception_lm": "its vision tower needs the package timm",
    "pi0": "predicts the actions of a robot, not tokens",
    "pocket_tts": "is trained on latents of sound by a flow, not on tokens",
    "voxtral_realtime": "takes sound that its processor lays beside every token",
    "xlstm": "the original's own backward raises: a tensor was changed in place",
}
CLASSES = {
    "ClvpModelForConditionalGeneration": "has a contrastive loss; ClvpForCausalLM is run",
    "CsmForConditionalGeneration": "takes codes that its processor lays beside the text; "
    "CsmDepthDecoderForCausalLM is run",
    "Gemma3nForConditionalGeneration": "its vision tower needs the package timm; "
    "Gemma3nForCausalLM is run",
    "InklingForConditionalGeneration": "needs the package scipy; InklingForCausalLM is run",
    "Kosmos2ForConditionalGeneration": "takes the places of images that its processor finds; "
    "Kosmos2TextForCausalLM is run",
    "Llama4ForConditionalGeneration": "the original's own forward raises in this version; "
    "Llama4ForCausalLM is run",
    "MoshiForConditionalGeneration": "takes codes of two speakers at once; MoshiForCausalLM is run",
    "MusicgenForConditionalGeneration": "its decoder, MusicgenForCausalLM, is run",
    "MusicgenMelodyForConditionalGeneration": "its decoder, MusicgenMelodyForCausalLM, is run",
    "Qwen2_5OmniForConditionalGeneration": "has no forward; its thinker is run",
    "Qwen2_5OmniTalkerForConditionalGeneration": "takes hidden states of the thinker, which is run",
    "Qwen3OmniMoeForConditionalGeneration": "has no forward; its thinker is run",
    "Qwen3OmniMoeTalkerForConditionalGeneration": "takes hidden states of the thinker, which is "
    "run",
    "SeamlessM4TTextToUnitForConditionalGeneration": "takes embeddings of the text model, which is "
    "run",
    "SeamlessM4Tv2TextToUnitForConditionalGeneration": "takes embeddings of the text model, which "
    "is run",
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": "takes hidden states of the "
    "talker",
}
