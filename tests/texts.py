"""Texts and tokenizers of tests: a tokenizer of bytes, files of random ids, a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTENCE = "The quick brown fox jumps over the lazy dog. "
FIRST = 3  # ids below it are special


def byte_tokenizer(
    special: bool = True, bos: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """One id a byte, behind <unk>, <s> and </s> when `special`; opens texts with <s> when `bos`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>"] if special else []
    names += sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    known = {"eos_token": "</s>", "unk_token": "<unk>"} if special else {}
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        known["bos_token"] = "<s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **known)
    tokenizer.chat_template = template
    return tokenizer


def write_ids(path: Path, documents: int, length: int, vocabulary: int = 96, seed: int = 0) -> str:
    """Write random ids as 16-bit numbers; returns the source to name on a command line, documents of `length` ids."""
    import numpy as np

    ids = np.random.default_rng(seed).integers(FIRST, vocabulary, documents * length, dtype=np.uint16)
    ids.astype("<u2").tofile(path)
    return f"{path}?length={length}"
