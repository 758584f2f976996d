"""The small values that configs are built of: common ones, and a few by class."""

from __future__ import annotations

from typing import Any


def _by_value(names: dict[int, str]) -> dict[str, Any]:
    return {name: value for value, group in names.items() for name in group.split()}


# Of text configs; a config class takes those that it has a field for.
TEXT: dict[str, Any] = _by_value(
    {
        0: "additional_vocab_size num_kv_shared_layers pad_token_id",
        1: (
            "bos_token_id decoder_sparse_step first_k_dense_replace mamba_n_groups "
            "mamba_ngroups n_group n_groups n_shared_experts num_codebooks num_shared_experts "
            "topk_group"
        ),
        2: (
            "encoder_layers eos_token_id expand index_kpool index_n_heads num_encoder_layers "
            "linear_num_key_heads loop_layer_index_start loop_num_passes mamba_expand moe_k "
            "moe_topk n_layers_per_attn_res_block n_mamba_heads num_experts_per_tok "
            "num_global_key_value_heads num_key_value_heads swa_num_key_value_heads top_k "
            "type_vocab_size zero_expert_num"
        ),
        3: "conv_L_cache decoder_layers num_decoder_layers",
        4: (
            "attention_heads d_rel decoder_attention_heads encoder_attention_heads index_topk "
            "latent_query_num layers linear_num_heads linear_num_value_heads "
            "loop_layer_index_end mamba_dt_rank max_window_layers moe_num_experts n_head "
            "n_heads n_layer n_layers n_routed_experts num_attention_heads num_experts "
            "num_heads num_hidden_layers num_layers num_local_experts rotary_dim "
            "swa_num_attention_heads time_step_rank"
        ),
        5: (
            "attention_window attention_window_size local_window_size sliding_window "
            "sliding_window_size"
        ),
        8: (
            "chunk_size dim_head global_head_dim head_dim hidden_size_per_layer_input "
            "index_head_dim kv_channels linear_head_dim linear_key_head_dim "
            "linear_value_head_dim loop_gate_rank mamba_chunk_size mamba_d_head mamba_d_state "
            "mamba_head_dim mamba_headdim mamba_n_heads mamba_num_heads qk_nope_head_dim "
            "qk_rope_head_dim rel_extent ssm_state_size state_size swa_head_dim v_head_dim"
        ),
        16: "kv_lora_rank q_lora_rank qk_head_dim",
        24: (
            "expert_ffn_hidden_size moe_intermediate_size moe_shared_expert_intermediate_size "
            "shared_expert_intermediate_size shared_intermediate_size"
        ),
        32: (
            "attention_hidden_size d_model emb_dim embed_dim embedding_size hidden_size "
            "lru_width moe_hidden_size n_embd word_embed_proj_dim"
        ),
        48: (
            "decoder_ffn_dim dff dim_ff encoder_ffn_dim ffn_dim ffn_hidden_size "
            "intermediate_size intermediate_size_mlp n_inner"
        ),
        64: (
            "mamba_d_ssm max_position_embeddings max_seq_len n_ctx n_positions "
            "original_max_position_embeddings"
        ),
        97: "unpadded_vocab_size vocab_size vocab_size_per_layer_input",
    }
) | {
    "attention_types": [[["global", "local"], 2]],
    "decoder_layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "initializer_range": 0.2,
    "is_decoder": True,
    # Scales and caps are off 1, where multiplying and dividing agree.
    "attention_multiplier": 0.4,
    "embedding_multiplier": 1.3,
    "final_logit_softcapping": 3.0,
    "lm_head_multiplier": 1.5,
    "logit_scale": 0.5,
    "logits_scaling": 3.0,
    "logits_soft_cap": 3.0,
    "residual_multiplier": 0.7,
    "routed_scaling_factor": 1.5,
    "mlp_only_layers": [],
    "rotary_pct": 0.5,
}

# Of the towers that see and hear, which no prompt here reaches; as deep as the text decoder, so
# that nothing tells the two apart by their depth.
OTHER: dict[str, Any] = _by_value(
    {
        1: "num_global_layers num_res_blocks",
        2: "encoder_layers layers num_blocks",
        3: "conv_kernel_size num_channels",
        4: (
            "attention_heads depth encoder_attention_heads num_attention_heads num_heads "
            "num_hidden_layers num_key_value_heads num_layers num_patches pos_emb_height "
            "pos_emb_width"
        ),
        8: "global_head_dim head_dim",
        14: "patch_size",
        16: "max_num_patches num_mel_bins num_position_embeddings position_embedding_size",
        28: "image_size window_size",
        30: "max_source_positions",
        32: (
            "adapter_in_dim adapter_input_size adapter_out_dim base_channels codebook_size "
            "d_model depthwise_separable_out_channel embed_dim encoder_hidden_size "
            "ext_pw_out_channel hidden_dim hidden_size latent_channels nemo_conv_channels "
            "num_embeddings out_hidden_size output_channels output_dim "
            "patch_embed_hidden_size projection_dim projector_hidden_size projector_input_dim "
            "projector_output_dim text_hidden_size upsample_groups vision_output_dim"
        ),
        48: (
            "encoder_ffn_dim intermediate_size mlp_dim projection_hidden_dim "
            "projection_intermediate_size"
        ),
        97: "vocab_size",
    }
) | {
    "attn_resolutions": [],
    "channel_multiplier": (1, 1),
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
}

# What a class needs beside them; dicts go to the parts of that name.
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MROPE = {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}}
_SHARED_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_DOTS3_NOTE = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_QWEN4_EXP = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 97,
    "make_ngram_vocab_size_divisible_by": 1,
    "ple_layer_ids": [],
    "hc_lowrank": 8,
}
_SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR_FULL = {"layer_types": ["linear_attention", "full_attention"] * 2}
_INKLING2 = {"layer_types": ["hybrid_sliding", "hybrid"] * 2}
_CONV_FULL = {"layer_types": ["conv", "full_attention"] * 2}
# The last two layers attend to the keys and values of the two before.
_SHARED_KEYS = _SLIDING_FULL | {"num_kv_shared_layers": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": _LINEAR_FULL,
    "Gemma3ForCausalLM": _SLIDING_FULL,
    "Gemma3ForConditionalGeneration": {"text_config": _SLIDING_FULL},
    "Gemma3nForCausalLM": _SHARED_KEYS,
    "Gemma4ForCausalLM": _SHARED_KEYS,
    "Gemma4ForConditionalGeneration": {"text_config": _SHARED_KEYS},
    "KimiLinearForCausalLM": _LINEAR_FULL,
    "Lfm2ForCausalLM": _CONV_FULL,
    "Lfm2VlForConditionalGeneration": {"text_config": _CONV_FULL},
    "BambaForCausalLM": {"attn_layer_indices": [1, 3]},
    "BltForCausalLM": {
        "encoder_hash_byte_group_vocab": 97,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": _MROPE["rope_parameters"]}},
    "CohereCompassForConditionalGeneration": {
        "text_config": {"rope_parameters": {"full_attention": _MROPE["rope_parameters"]}}
    },
    "Cosmos3EdgeForConditionalGeneration": {"text_config": _MROPE},
    "DbrxForCausalLM": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "Dots3NoteForCausalLM": _DOTS3_NOTE,
    "Dots3NoteForConditionalGeneration": {
        "text_config": _DOTS3_NOTE,
        "vision_config": {"per_layer_config": {}},
    },
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config": {
            "moe_intermediate_size": [24, 24],
            "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]},
        }
    },
    "Glm5NextForConditionalGeneration": {"text_config": {"qk_rope_head_dim": 0}},
    "Glm46VForConditionalGeneration": {"text_config": _MROPE},
    "Glm4vForConditionalGeneration": {"text_config": _MROPE},
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 0]}}
    },
    "GlmOcrForConditionalGeneration": {"text_config": _MROPE},
    "GraniteMoeHybridForCausalLM": _LINEAR_FULL,
    "HYV4VLForConditionalGeneration": {"text_config": _MROPE},
    "HunYuanVLForConditionalGeneration": {
        "text_config": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 1, 1]}}
    },
    "Inkling2ForCausalLM": _INKLING2,
    "Inkling2ForConditionalGeneration": {"text_config": _INKLING2},
    "Inkling2LoopForCausalLM": _INKLING2,
    "Inkling2LoopForConditionalGeneration": {"text_config": _INKLING2},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": _CONV_FULL,
    "Mamba2ForCausalLM": {"head_dim": 16},
    "PaddleOCRVLForConditionalGeneration": {"text_config": _MROPE},
    "Qwen2VLForConditionalGeneration": {"text_config": _MROPE},
    "Qwen2_5OmniThinkerForConditionalGeneration": {"text_config": _MROPE},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": _MROPE},
    "Qwen4ExpForCausalLM": _QWEN4_EXP,
    "Qwen4ExpForConditionalGeneration": {"text_config": _QWEN4_EXP},
    "ReformerModelWithLMHead": {
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "feed_forward_size": 48,
        "attention_head_size": 8,
        "local_attn_chunk_length": 4,
    },
    "RoCBertForCausalLM": {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": 97,
        "pronunciation_vocab_size": 97,
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {"layers_block_type": _SHARED_HYBRID, "adapter_rank": 4},
    "ZambaForCausalLM": {"layers_block_type": _SHARED_HYBRID, "attention_hidden_size": 64},
    "ZayaForCausalLM": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 80}},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 80}},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 3},
        "vision_config": {"sam_config": {"downsample_channels": [32, 32]}},
    },
    "UnlimitedOcrForConditionalGeneration": {
        "vision_config": {"sam_config": {"downsample_channels": [32, 32]}}
    },
    "Florence2ForConditionalGeneration": {
        "vision_config": {
            "depths": (1, 1),
            "patch_size": (7, 3),
            "patch_stride": (4, 2),
            "patch_padding": (3, 1),
            "patch_prenorm": (False, True),
            "embed_dim": (32, 32),
            "num_heads": (4, 4),
            "num_groups": (4, 4),
        }
    },
    "FunAsrNanoForConditionalGeneration": {"adaptor_config": {"intermediate_size": 8}},
    "DiffusionGemmaForBlockDiffusion": {"text_config": {"top_k_experts": 2}, "canvas_length": 4},
    "Nemotron3_5TranscribeForConditionalGeneration": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}}
    },
    "KyutaiSpeechToTextForConditionalGeneration": {
        "codebook_vocab_size": 33,
        "num_codebooks": 1,
        "codec_config": {"num_filters": 4},
    },
    "Molmo2ForConditionalGeneration": {
        "vision_config": {"image_size": [28, 28]},
        "adapter_config": {"vision_feature_layer": [1, 0]},
    },
    "VibeVoiceAsrForConditionalGeneration": {
        part: {
            "num_filters": 4,
            "downsampling_ratios": [2, 2],
            "depths": [1, 1, 1],
            "hidden_size": 32,
        }
        for part in ("semantic_tokenizer_encoder_config", "acoustic_tokenizer_encoder_config")
    },
    "NemotronH_Omni_Reasoning_V3": {
        "vision_config": {"video_temporal_patch_size": 2},
        "vision_hidden_size": 32,
        "projector_hidden_size": 32,
    },
    "MuseSparkForConditionalGeneration": {
        "audio_config": {
            "patch_sizes": [4],
            "hidden_sizes": [32],
            "depths": [1],
            "num_hidden_layers": 1,
        },
        "text_config": {"moe_hidden_size": 40},
        "out_hidden_size": 32,
        "projector_hidden_size": 32,
    },
    "MuseGlimmerForConditionalGeneration": {"out_hidden_size": 32, "projector_hidden_size": 32},
    "PPFormulaNetForConditionalGeneration": {
        "vision_config": {
            "post_conv_in_channels": 32,
            "post_conv_mid_channels": 32,
            "post_conv_out_channels": 32,
            "decoder_hidden_size": 32,
        }
    },
    "OmniASRForConditionalGeneration": {
        "audio_config": {
            "conv_dim": [32] * 2,
            "conv_kernel": [3, 3],
            "conv_stride": [2, 2],
            "initializer_range": 0.2,
        }
    },
    "Qwen3OmniMoeForConditionalGeneration": {"enable_audio_output": False},
    "Granite4VisionForConditionalGeneration": {
        "image_grid_pinpoints": [[28, 28]],
        "deepstack_layer_map": [],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "EvollaForProteinText2Text": {
        "resampler_dim_head": 8,
        "resampler_heads": 4,
        "resampler_num_latents": 4,
        "resampler_depth": 1,
        "aligner_num_add_layers": 1,
    },
    "Qwen2_5OmniForConditionalGeneration": {"enable_audio_output": False},
    "Apertus1p5ForConditionalGeneration": {
        "image_token_offset": 33,
        "audio_token_offset": 65,
        "audio_config": {"codebook_dim": 32, "num_filters": 4},
    },
}
