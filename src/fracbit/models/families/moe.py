"""Mixtures of experts on Llama's attention: Mixtral, Qwen2-MoE, Qwen3-MoE.

transformers 5 keeps all experts of a block in two tensors, `gate_up_proj [experts, 2 inner, width]` and
`down_proj [experts, width, inner]`; `experts.split_experts` turns them into the linears named here. The
router reads the same norm and stays float: its error moves tokens between experts.
"""

from dataclasses import replace

from fracbit.models.families.llama import ATTENTION, HEAD_NORMS, LLAMA, MLP, VALUE
from fracbit.models.family import Norm, Pair, Sublayer

EXPERT = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
READERS = ("mlp.gate", "mlp.shared_expert_gate", *EXPERT, *SHARED, *MLP)

MOE = replace(
    LLAMA,
    name="moe",
    model_types=("mixtral", "qwen2_moe", "qwen3_moe"),
    linears=(
        ATTENTION,
        ("self_attn.o_proj",),
        SHARED,
        ("mlp.shared_expert.down_proj",),
        EXPERT,
        ("mlp.experts.*.down_proj",),
        MLP,
        ("mlp.down_proj",),
    ),
    sublayers=(
        Sublayer(("self_attn",), ATTENTION),
        Sublayer(("mlp.shared_expert",), SHARED),
        Sublayer(("mlp.experts.*",), EXPERT),
        Sublayer(("mlp",), MLP),
    ),
    norms=(Norm("input_layernorm", ATTENTION), Norm("post_attention_layernorm", READERS), *HEAD_NORMS),
    pairs=(
        VALUE,
        Pair("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
        Pair("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
        Pair("mlp.up_proj", ("mlp.down_proj",)),
    ),
    keep_float={"mlp.gate": "chooses experts", "mlp.shared_expert_gate": "one output"},
)
