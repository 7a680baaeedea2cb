"""What the rules of tiny.py do not get right: sizes of single types, and inputs that a type cannot run without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Sizes = dict[str, Any]

WIDTH, INNER, HEADS, HEAD, EXPERTS, EXPERT_INNER = 32, 48, 4, 16, 4, 24
VOCABULARY, FIRST_SPECIAL, POSITIONS = 96, 80, 128
"""Widths of the tiny models; ids from FIRST_SPECIAL on stand for images, sounds and the like."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
IMAGE_ROPE = ROPE | {"mrope_section": [2, 1, 1]}
SECTIONS: Sizes = {"text_config.rope_parameters": IMAGE_ROPE}
MOE_DEFAULTS: Sizes = {"num_experts_per_tok": 2, "n_routed_experts": EXPERTS, "first_k_dense_replace": 1}
SMALL_AUDIO: Sizes = {
    "audio_config.ext_pw_out_channel": 16,
    "audio_config.depthwise_separable_out_channel": 16,
    "audio_config.nemo_conv_channels": 16,
    "audio_config.bias_max_distance": 16,
}
SMALL_TOKENIZERS: Sizes = {
    f"{part}_tokenizer_encoder_config.{name}": value
    for part in ("acoustic", "semantic")
    for name, value in {"depths": [1, 1], "downsampling_ratios": [2]}.items()
}
INDEXER: Sizes = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
VQ: Sizes = {
    "vq_config.base_channels": 32,
    "vq_config.channel_multiplier": [1, 1],
    "vq_config.latent_channels": 32,
}
TOWER: Sizes = {
    "model_type": "siglip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 4,
}
"""Stands for a tower that needs a package of its own (timm); only text is read."""
EXTRA: Mapping[str, Sizes] = {
    "blip-2": {"image_token_index": FIRST_SPECIAL},
    "instructblip": {"image_token_index": FIRST_SPECIAL},
    "instructblipvideo": {"video_token_index": FIRST_SPECIAL},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "use_cache": False,
        "global_config.hidden_size": 64,
        "global_config.head_dim": 16,
        "encoder_hash_byte_group_vocab": 64,
    },
    "chameleon": VQ | {"vocabulary_map": {"<image>": 80, "IMGIMGA0Z": 81}, "vq_config.resolution": 16},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": ROPE}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "vision_config.sam_config.downsample_channels": [16, 32],
    },
    "diffusion_gemma": {
        "text_config.num_experts": EXPERTS,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": EXPERT_INNER,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": MOE_DEFAULTS | {"n_shared_experts": 1},
    "emu3": VQ | {"vocabulary_map": {"<image>": 80, "<|visual token 000000|>": 81}},
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [24, 16],
        "text_config.rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
    },
    "dots3_note": {"audio_config.adapter_out_dim": WIDTH},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "florence2": {
        "vision_config.depths": [1, 1],
        "vision_config.patch_size": [4, 3],
        "vision_config.patch_stride": [4, 2],
        "vision_config.patch_padding": [1, 1],
        "vision_config.patch_prenorm": [False, True],
        "vision_config.embed_dim": [8, 16],
        "vision_config.num_heads": [2, 2],
        "vision_config.num_groups": [2, 2],
    },
    "fast_vlm": {"vision_config": TOWER},
    "perception_lm": {"vision_config": TOWER | {"model_args": {"embed_dim": WIDTH}}},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "gemma3n_text": {"intermediate_size": INNER, "num_kv_shared_layers": 2},
    "glm46v": SECTIONS,
    "glm4v": SECTIONS,
    "glm_ocr": SECTIONS,
    "glmga": SECTIONS,
    "glm4v_moe": {"text_config.rope_parameters": IMAGE_ROPE | {"partial_rotary_factor": 1.0}},
    "glm5_next": {"text_config.index_kpool": 2},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "vision_config.hidden_size": 64,
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1, 1, 1, 1],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "hunyuan_vl": {
        "text_config.head_dim": HEAD,
        "text_config.rope_parameters": ROPE | {"mrope_section": [2, 2, 2, 2]},
        "vision_config.max_image_size": 16,
        "vision_config.img_max_token_num": 16,
        "vision_config.max_vit_seq_len": 16,
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "janus": VQ | {"vq_config.image_token_embed_dim": 32},
    "kyutai_speech_to_text": {"codec_config.upsample_groups": 32, "num_codebooks": 3},
    "longcat_flash": {"zero_expert_num": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "ministral": {"head_dim": HEAD},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1, 2]},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0], "text_config.rope_scaling_layers": [0, 1]},
    "muse_spark": {
        "audio_config.num_hidden_layers": 2,
        "audio_config.patch_sizes": [4, 2],
        "audio_config.hidden_sizes": [16, 32],
        "audio_config.depths": [1, 1],
    },
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": 2},
    "nemotron_h_omni": {
        "vision_config.max_img_size": 16,
        "vision_config.patch_dim": 48,
        "vision_config.video_patch_dim": 96,
    },
    "paddleocr_vl": {"text_config.rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}},
    "qwen2_5_omni_thinker": SECTIONS | {"vision_start_token_id": 91},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 91},
    "qwen2_5_vl": SECTIONS,
    "qwen2_vl": SECTIONS,
    "phi4_multimodal": SMALL_AUDIO,
    "pp_formulanet": {
        "vision_config.post_conv_in_channels": WIDTH,
        "vision_config.post_conv_mid_channels": WIDTH,
        "vision_config.post_conv_out_channels": WIDTH,
    },
    "qwen4_exp": {f"text_config.{name}": value for name, value in INDEXER.items()},
    "qwen4_exp_text": INDEXER,
    "qwen3_omni_moe": {
        "talker_config.spatial_merge_size": 2,
        "talker_config.text_config.shared_expert_intermediate_size": EXPERT_INNER,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "step3p7": {"text_config.sliding_window": 5},
    "udop": {"decoder_start_token_id": 0, "pad_token_id": 0},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [16, 32]},
    "vibevoice_asr": SMALL_TOKENIZERS,
    "vision-encoder-decoder": {"decoder_start_token_id": 1, "pad_token_id": 0},
    "xlstm": {"chunk_size": 16, "hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 4,
        "attention_head_dim": 16,
    },
}
"""What a type needs besides, by its name: a path of attributes, separated by dots, and the value."""


IDS = "ids"
INPUTS: Mapping[str, Mapping[str, tuple[int, ...] | str]] = {
    "blip": {"pixel_values": (3, 16, 16)},
    "blip-2": {"pixel_values": (3, 16, 16), "special": (4,)},
    "florence2": {"decoder_input_ids": IDS},
    "idefics": {"pixel_values": (1, 3, 16, 16), "image_attention_mask": (12, 1)},
    "instructblip": {"pixel_values": (3, 16, 16), "qformer_input_ids": IDS, "special": (4,)},
    "instructblipvideo": {"pixel_values": (1, 3, 16, 16), "qformer_input_ids": IDS, "special": (4,)},
    "kosmos-2": {"pixel_values": (3, 16, 16), "image_embeds_position_mask": (12,)},
    "kyutai_speech_to_text": {"input_ids": (4,)},
    "pix2struct": {"flattened_patches": (4, 34), "decoder_input_ids": IDS},
    "pp_formulanet": {"pixel_values": (3, 16, 16), "decoder_input_ids": IDS},
    "t5gemma2": {"decoder_input_ids": IDS},
    "udop": {"bbox": (12, 4), "decoder_input_ids": IDS},
    "vision-encoder-decoder": {"pixel_values": (3, 16, 16), "decoder_input_ids": IDS},
    "voxtral_realtime": {"input_features": (16, 96)},
}
"""What a type cannot run without, besides ids: shapes of one sample, or the ids once more."""
