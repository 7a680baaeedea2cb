"""Names that people bring from other programs, and what they are called here. Torch-free.

A word of a scheme that means one thing is read as it (`fp4_e2m1/64`). For a name that means another setting, or several
schemes, the error says what to write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fracbit.errors import near_matches

_SPLIT = re.compile(r"fp(\d)_(e\d+m\d+)")
USUAL = (
    "int2z/64", "int3z/64", "int4/64", "int4z/64", "int4z/128", "int8/64", "nf2/64", "nf3/64", "nf4/64", "fp4_e2m1/64",
    "float:e2m14/64", "kmeans4/64", "power4/64", "dynamic4/64", "quantile4/64",
)  # fmt: skip
"""Schemes that are written often; the nearest of them is offered for a word that is none."""
_WEIGHTS_ALONE = "--scheme int{0}z/128, or --for vllm (its own grid)"
MEANT: Mapping[str, str] = {
    "fp4": "fp4_e2m1/64; in blocks of 32 with powers of 2, MXFP4: 'ocp4/32 s=e8m0'",
    "fp6": "fp6_e2m3/64 or fp6_e3m2/64",
    "fp8": "fp8_e4m3/64 or fp8_e5m2/64",
    "mxfp4": "'ocp4/32 s=e8m0'",
    "mxfp8": "'ocp8/32 s=e8m0'",
    "nvfp4": "'ocp4/16 s=ocp8:tensor'",
    "iq4_nl": "iq4/32, or --for llama.cpp",
    "bf16|fp16|fp32|bfloat16|float16|float32|half": "no scheme: the model is float, and --keep PATTERN keeps layers so",
    r"w(\d)a16(-?g?\d+)?": _WEIGHTS_ALONE,
    r"w8a8": "--scheme int8/row with --set calibration.inputs=int8/token and --calibration TEXT",
    r"q(\d)(?:_[a-z0-9]+)*|iq\d_[a-z0-9_]+": "--for llama.cpp, with --average-bits {0}.5 or --scheme int{0}z/32",
    r"(\d)[- ]?bits?([-_ ]?\d+g)?": "--scheme int{0}z/64; a fraction is --average-bits {0}.5",
    r"u?int(\d)[-_](?:weight[-_]only|wo|asym|sym)": "--scheme int{0}z/64",
}
"""Words of other programs, as patterns of lower-case words, and what to write for them."""

METHODS: Mapping[str, str] = {
    "autoround": "--set calibration.tweak=train trains what is stored block by block, or --preset best",
    "auto-round": "--set calibration.tweak=train trains what is stored block by block, or --preset best",
    "bitsandbytes": "its data type is --scheme nf4/64",
    "bnb": "its data type is --scheme nf4/64",
    "exl2": "--average-bits 3.5 divides bits over the layers",
    "exl3": "--average-bits 3.5 divides bits over the layers",
    "guidedquant": "--set calibration.weigh=loss",
    "hqq": "the nearest is rtn with searched ranges: --quantizer rtn --set search=true",
    "imatrix": "--calibration TEXT with --quantizer gptq",
    "k-means": "it is a data type: --scheme kmeans4/64",
    "nearest": "write rtn",
    "none": "write rtn",
    "omniquant": "--set calibration.tweak=train trains what is stored block by block",
    "optq": "write gptq",
    "quarot": "--set calibration.transforms=rotate",
    "round": "write rtn",
    "smoothquant": "--set calibration.transforms=smooth",
    "spinquant": "--set calibration.transforms=rotate",
    "spqr": "--set outliers=cost:0.01 with --quantizer gptq",
    "squeezellm": "its data type is --scheme kmeans4/64, and --set outliers=cost:0.01",
}
"""Methods of other programs, and how to have what they do."""


def as_written_here(word: str) -> str:
    """A word of a scheme with the names of other programs replaced: `FP4_E2M1/64` is `float:e2m14/64`."""
    return _SPLIT.sub(r"float:\2\1", word.strip().lower())


def meant(word: str) -> str:
    """What to write for a word of other programs; "" for any other word."""
    text = word.strip().lower().partition("/")[0]
    for pattern, written in MEANT.items():
        match = re.fullmatch(pattern, text)
        if match is not None:
            return written.format(*(group or "4" for group in match.groups()))
    return ""


def scheme_hint(word: str) -> str:
    """For a word that is no scheme, what it means elsewhere or the nearest scheme; empty where nothing is near."""
    if meant(word):
        return f"write {meant(word)}; "
    said, mark, _ = near_matches(word.strip().lower(), USUAL).partition("? ")
    return f"{said}? " if mark else ""


def method_hint(name: str) -> str:
    """How to have what a method of another program does; empty for a name that is none."""
    found = METHODS.get(name.lower().partition(":")[0])
    return f"{found}; " if found else ""
