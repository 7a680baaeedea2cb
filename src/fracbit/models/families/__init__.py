"""The table of model families: one file each holds the data, one line here makes it known.

Where a model type has variants, their order counts: the first one with conditions that fit the config is taken.
"""

from fracbit.models.families.bloom import BLOOM, BLOOM_POST_NORM
from fracbit.models.families.falcon import FALCON_ONE_NORM, FALCON_SEQUENTIAL, FALCON_TWO_NORMS
from fracbit.models.families.gemma import GEMMA, GEMMA2
from fracbit.models.families.gpt2 import GPT2
from fracbit.models.families.gpt_neox import GPT_NEOX
from fracbit.models.families.llama import LLAMA
from fracbit.models.families.moe import MOE
from fracbit.models.families.opt import OPT, OPT_POST_NORM
from fracbit.models.families.phi3 import PHI3
from fracbit.models.family import Family

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    GEMMA,
    GEMMA2,
    PHI3,
    MOE,
    OPT,
    OPT_POST_NORM,
    GPT2,
    GPT_NEOX,
    BLOOM,
    BLOOM_POST_NORM,
    FALCON_TWO_NORMS,
    FALCON_ONE_NORM,
    FALCON_SEQUENTIAL,
)
