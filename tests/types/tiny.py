"""Tiny random models of every type that transformers can name: sizes are found by the names of a config's attributes.

A type is written `table:name`: `causal:llama`, `image:llava`, `multimodal:voxtral`. What the rules miss is in corrections.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from corrections import (
    EXPERT_INNER,
    EXTRA,
    FIRST_SPECIAL,
    HEAD,
    HEADS,
    INNER,
    INPUTS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    Sizes,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

TABLES = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "image": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "multimodal": ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
}


def all_types() -> list[str]:
    """Every type of the three tables, once: the table for several inputs repeats that for images."""
    from transformers.models.auto import modeling_auto

    listed = {table: list(getattr(modeling_auto, names)) for table, (_, names) in TABLES.items()}
    listed["multimodal"] = [name for name in listed["multimodal"] if name not in listed["image"]]
    return [f"{table}:{name}" for table, names in listed.items() for name in names]


def auto_of(kind: str) -> Any:
    """The auto class of a type."""
    import transformers

    return getattr(transformers, TABLES[kind.partition(":")[0]][0])


# --- sizes -----------------------------------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HIDDEN = _words("hidden_size d_model n_embd")
WIDTHS = _words("""
    hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim out_hidden_size text_hidden_size emb_dim
    encoder_hidden_size vision_hidden_size hidden_size_global embedding_dim image_text_hidden_size lru_width
    input_embedding_size output_embedding_size backbone_hidden_size thinker_hidden_size attention_hidden_size
    projection_dim hidden_dim dim_model attention_head_dim decoder_hidden_size audio_hidden_size
    projection_hidden_size decoder_dim adapter_in_dim adapter_out_dim patch_embed_hidden_size merged_hidden_size
    projection_hidden_dim projector_output_dim projector_input_dim output_channels adapter_input_size moe_hidden_size
""")
INNERS = _words("""
    intermediate_size ffn_dim n_inner d_ff dff dim_ff mlp_dim feed_forward_size encoder_ffn_dim decoder_ffn_dim
    d_inner ffn_hidden_size dense_intermediate_size intermediate_size_mlp shared_intermediate_size
    projector_hidden_size alignment_intermediate_size projection_intermediate_size shared_expert_intermediate_size
    moe_shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim
""")
LAYERS = _words("""
    num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_decoder_layers
    num_encoder_layers layers num_blocks
""")
HEAD_COUNTS = _words("""
    num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
    num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_sliding_attention_heads
    conf_num_attention_heads resampler_heads resampler_n_heads linear_num_heads
""")
KEY_HEADS = _words("""
    num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads num_query_groups
""")
HEAD_SIZES = _words(
    "head_dim swa_head_dim global_head_dim attention_head_size dim_head d_head d_kv kv_channels"
)
COUNTED: Mapping[int, tuple[str, ...]] = {
    1: _words("first_k_dense_replace num_dense_layers max_window_layers num_kv_shared_layers"),
    2: (
        *LAYERS,
        *_words("""
        index_n_heads linear_num_key_heads window_size resampler_depth conf_num_hidden_layers split_ngram_parts
        num_experts_per_tok moe_topk moe_k num_experts_per_token moe_top_k top_k_experts num_shared_experts
        n_shared_experts moe_num_shared_experts n_groups mamba_n_groups mamba_ngroups full_attention_interval
        """),
    ),
    4: (
        *HEAD_COUNTS,
        *_words("""
        num_experts n_routed_experts num_local_experts moe_num_experts linear_num_value_heads mamba_n_heads
        mamba_num_heads time_step_rank mamba_dt_rank rotary_dim patch_size num_filters base_channels pos_emb_height
        pos_emb_width num_query_tokens latent_query_num resampler_n_latents resampler_num_latents num_image_tokens
        mm_tokens_per_image image_seq_length
        """),
    ),
    5: _words("sliding_window attention_window_size sliding_window_size"),
    8: _words("""
        qk_nope_head_dim qk_rope_head_dim index_topk linear_key_head_dim linear_value_head_dim linear_head_dim
        attention_chunk_size hidden_size_per_layer_input laurel_rank mamba_d_state state_size ssm_state_size
        mamba_chunk_size chunk_size adapter_rank resampler_dim_head resampler_head_dim gated_norm_rank o_lora_rank
        hc_lowrank d_rel
    """),
    16: _words("""
        kv_lora_rank v_head_dim qk_head_dim index_head_dim mamba_d_head mamba_head_dim mamba_headdim
        query_pre_attn_scalar router_hidden_size image_size num_position_embeddings num_mel_bins codebook_dim
        feature_size ple_embed_dim rel_extent downsample_hidden_size input_feat_size max_num_patches num_patches seq_len
    """),
    EXPERT_INNER: _words("q_lora_rank moe_intermediate_size expert_ffn_hidden_size"),
    32: _words("""
        max_source_positions max_2d_position_embeddings codebook_size num_embeddings position_embedding_size
    """),
    64: _words("original_max_position_embeddings ngram_vocab_size_base"),
    VOCABULARY: _words("vocab_size vocab_size_per_layer_input"),
    POSITIONS: _words("""
        max_target_positions n_ctx n_positions max_position_embeddings max_seq_len context_length model_max_length
    """),
}
"""What attributes become where they are larger."""
LIMITS = {name: size for size, names in COUNTED.items() for name in names}
LISTS: Mapping[str, list[int]] = {
    "deepstack_visual_indexes": [1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "cross_attention_layers": [1],
    "mlp_only_layers": [],
}
"""Which layers of two are meant where a config lists some."""
SPECIAL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "sep_token_id": 3,
}
DROPPED = {
    "id2label",
    "label2id",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "architectures",
    "_name_or_path",
}
TOKEN = re.compile(
    r"token_(id|index|ids)$|_(start|end|newline|patch|think|nothink|pad|bos|eos)_id$|^eod_token"
)


def shrink(config: PreTrainedConfig, ids: dict[int, int]) -> Sizes:
    """The tables of a config with every size made small; `ids`: small numbers of special tokens, by those at full size."""
    from transformers import PreTrainedConfig

    given = {name: value for name, value in config.to_dict().items() if name not in DROPPED}
    picked, chosen = _picked_layers(given)
    by_layer = {int(index): each for index, each in (given.pop("per_layer_config", None) or {}).items()}
    made: Sizes = {}
    for name, value in given.items():
        held = vars(config).get(name)  # not getattr: what differs by layer must not be asked of the whole
        if isinstance(held, PreTrainedConfig):
            made[name] = shrink(held, ids)
        else:
            made[name] = picked[name] if name in picked else _shrunken(name, value, given, ids)
    _fit_heads(made, given)
    _fit_rope(made)
    if chosen and by_layer:
        made["per_layer_config"] = {
            place: _changed(by_layer[index], given, ids)
            for place, index in enumerate(chosen)
            if index in by_layer
        }
    return made


def _changed(changes: Sizes, given: Sizes, ids: dict[int, int]) -> Sizes:
    """What one layer has other than the rest; one size at least stays different."""
    small = {name: _shrunken(name, value, given | changes, ids) for name, value in changes.items()}
    _fit_heads(small, changes)
    return {name: value // 2 if name == "kv_lora_rank" else value for name, value in small.items()}


def _shrunken(name: str, value: Any, given: Sizes, ids: dict[int, int]) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if TOKEN.search(name):
        return _token(name, value, ids)
    if isinstance(value, (list, tuple)):
        small = [LIMITS.get(name, INNER)] * len(value)
        return small if name in ("image_size", "intermediate_size") else LISTS.get(name, value)
    return _size(name, value, given) if isinstance(value, int) else value


def _size(name: str, value: int, given: Sizes) -> int:
    """A whole number made small; widths that are multiples of others stay so."""
    hidden = next((given[each] for each in HIDDEN if isinstance(given.get(each), int)), 0) or value
    if name in WIDTHS:
        return WIDTH * (1 if value % hidden else value // hidden)
    if name in INNERS:
        expand = given.get("expand") or 0
        return int(expand * WIDTH) if value == expand * hidden else min(value, INNER)
    limit = VOCABULARY if name.endswith("vocab_size") else LIMITS.get(name)
    return value if limit is None else min(value, limit)


def _token(name: str, value: Any, ids: dict[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_token(name, each, ids) for each in value][: 1 if name in SPECIAL else None]
    known = name.removeprefix("forced_")
    if not isinstance(value, int) or value < 0:
        return value
    if known in SPECIAL:
        return SPECIAL[known]
    if value < FIRST_SPECIAL and value not in ids:
        return value
    return ids.setdefault(value, FIRST_SPECIAL + len(ids) % (VOCABULARY - FIRST_SPECIAL))


def _picked_layers(given: Sizes) -> tuple[Sizes, list[int]]:
    """The per-layer lists, cut to the first layer of every kind, the number of layers that are left, and which these are."""
    listed = given.get("layers_block_type")
    for count in (*LAYERS, ""):
        depth = given.get(count, len(listed) if listed and not count else None)
        if not isinstance(depth, int) or depth < 2:
            continue
        lists = {name: list(value) for name, value in given.items() if _tells_kinds(value, depth)}
        if not lists:
            continue
        first: dict[tuple[Any, ...], int] = {}
        for index, kind in enumerate(zip(*lists.values(), strict=True)):
            first.setdefault(kind, index)
        chosen = sorted(first.values())[:5]
        if len(chosen) == 1:
            chosen = [*chosen, chosen[0] + 1]
        cut = {name: [value[index] for index in chosen] for name, value in lists.items()}
        return cut | ({count: len(chosen)} if count else {}), chosen
    return {}, []


def _tells_kinds(value: Any, depth: int) -> bool:
    """Whether a value lists something for each of `depth` layers, the same for some of them."""
    if not isinstance(value, (list, tuple)) or len(value) != depth:
        return False
    return all(isinstance(each, (str, int, float, bool)) for each in value) and len(set(value)) < depth


def _fit_heads(made: Sizes, given: Sizes) -> None:
    """Heads of keys in the proportion that they had, sizes of heads that fit each other, groups of experts."""
    counts = [given[name] for name in HEAD_COUNTS if isinstance(given.get(name), int)]
    for name in KEY_HEADS:
        value = given.get(name)
        if isinstance(value, int):
            made[name] = HEADS if value >= max(counts, default=value) else min(value, 2)
    hidden = next((given[each] for each in HIDDEN if isinstance(given.get(each), int)), None)
    for name in HEAD_SIZES:
        if isinstance(given.get(name), int) and given[name]:
            follows = bool(counts) and given[name] * counts[0] == hidden
            made[name] = WIDTH // HEADS if follows else HEAD
    if given.get("qk_rope_head_dim") and given.get("head_dim"):
        made["head_dim"] = (
            made["qk_rope_head_dim"] if given["head_dim"] == given["qk_rope_head_dim"] else HEAD
        )
    if given.get("qk_nope_head_dim") and given.get("v_head_dim") == given["qk_nope_head_dim"]:
        made["v_head_dim"] = made["qk_nope_head_dim"]
    for name in ("n_group", "num_expert_group"):
        if (given.get(name) or 1) > 1:
            made |= {name: 2, "topk_group": 1}


def _fit_rope(made: Sizes) -> None:
    """Sections of rotary positions that add up to half of a head, in the proportions that they had."""
    hidden, heads = made.get("hidden_size") or WIDTH, made.get("num_attention_heads") or HEADS
    if not isinstance(hidden, int) or not isinstance(heads, int):
        return
    size = made.get("head_dim") or hidden // heads
    rope = made.get("rope_parameters")
    for table in (rope, *(rope.values() if isinstance(rope, dict) else ())):
        if isinstance(table, dict) and "mrope_section" in table:
            part = table.get("partial_rotary_factor") or made.get("partial_rotary_factor") or 1
            table["mrope_section"] = _sections(table["mrope_section"], int(size * part) // 2)


def _sections(old: list[int], half: int) -> list[int]:
    parts = [max(1, half * each // sum(old)) for each in old[1:]]
    return [half - sum(parts), *parts]


# --- models ----------------------------------------------------------------------------------------------------------


def full_config(kind: str) -> PreTrainedConfig:
    """The default config of a type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: PreTrainedConfig = CONFIG_MAPPING[kind.partition(":")[2]]()
    return config


def config_of(kind: str) -> PreTrainedConfig:
    """The tiny config of a type."""
    full, name = full_config(kind), kind.partition(":")[2]
    extra = EXTRA.get(kind) or EXTRA.get(name) or {}
    made = shrink(full, {})
    for path, value in extra.items():
        *outer, leaf = path.split(".")
        table = made
        for each in outer:
            table = table[each]
        table[leaf] = value
    return type(full).from_dict(made)


def model_of(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a type, in float32; matrices large enough that every part matters to the logits."""
    import torch

    torch.manual_seed(seed)
    model = auto_of(kind).from_config(config_of(kind), dtype=torch.float32)
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def inputs_of(kind: str, samples: int = 2, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass: ids [samples, length] of the plain tokens, and what the type cannot do without."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, FIRST_SPECIAL, (samples, length), generator=generator)
    made = {"input_ids": ids}
    for name, shape in INPUTS.get(kind.partition(":")[2], {}).items():
        if isinstance(shape, str):
            made[name] = ids
        elif name == "input_ids":
            made[name] = torch.randint(4, 32, (samples, length, *shape), generator=generator)
        elif name == "bbox":
            made[name] = torch.rand((samples, *shape), generator=generator).sort(-1).values
        elif name == "special":
            ids[:, 1 : 1 + shape[0]] = FIRST_SPECIAL
        elif name == "image_attention_mask":
            made[name] = torch.ones((samples, *shape), dtype=torch.long)
        elif name == "image_embeds_position_mask":
            made[name] = (torch.arange(*shape) < 4).expand(samples, -1)
        else:
            made[name] = torch.randn((samples, *shape), generator=generator)
    return made
