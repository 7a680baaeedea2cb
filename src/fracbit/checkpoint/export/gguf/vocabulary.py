"""The tokenizer of a GGUF file: its tokens by id with their kinds and scores, from the files of a checkpoint.

Three spellings: pieces of sentencepiece (`tokenizer.model`), the same pieces in `tokenizer.json`, and merges of bytes, for
which the file also names how text is cut (pretokenizers.py). A folder without a tokenizer gives a file without one, which
llama.cpp runs on ids.

Ref: convert_hf_to_gguf.py of llama.cpp, build 11434.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fracbit.checkpoint.export.gguf.architectures import Architecture, TokenRules, VocabularyKind
from fracbit.checkpoint.export.gguf.package import package
from fracbit.checkpoint.export.gguf.pretokenizers import pretokenizer
from fracbit.checkpoint.export.gguf.sentencepiece_model import NORMAL, USER_DEFINED, read_pieces
from fracbit.errors import FormatError
from fracbit.records.files import read_json

UNKNOWN, CONTROL, UNUSED = 2, 3, 5
SPACE = "\u2581"  # what sentencepiece writes for a space
ADDED = -1000.0  # the score of a token that was added to the pieces
ABSENT = -10000.0  # that of an id without a token
FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "tokenizer_config.json", "tekken.json")
"""Files of which a folder with a tokenizer has one."""
LOOK_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
FENCES = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file by id. `model` and `pre`: llama.cpp's names of the tokenizer and of how it cuts text.

    `scores` is empty where a tokenizer merges.
    """

    model: str
    pre: str = ""
    tokens: Sequence[str | bytes] = ()
    kinds: Sequence[int] = ()
    scores: Sequence[float] = ()
    rules: TokenRules = TokenRules()  # noqa: RUF009, it is frozen

    @property
    def merges(self) -> bool:
        """Whether it holds merges."""
        return self.model == "gpt2"


def vocabulary_of(folder: Path, architecture: Architecture, size: int, name: str) -> Vocabulary:
    """The vocabulary of the tokenizer in `folder` for a model with `size` tokens.

    Raises `FormatError` for a tokenizer that llama.cpp does not know; `name` is what it calls the model.
    """
    if not any((folder / file).is_file() for file in FILES):
        return Vocabulary("none")
    spelling = next((each for each in architecture.spellings if _has(folder, each)), None)
    if spelling is None:
        wanted = " or ".join(
            "tokenizer.model" if each == "sentencepiece" else "tokenizer.json"
            for each in architecture.spellings
        )
        raise FormatError(
            f"{name} has no tokenizer that llama.cpp reads for {architecture.name}; put its {wanted} beside config.json"
        )
    rules = _rules(folder, architecture, spelling, size)
    if spelling == "bytes":
        tokens, kinds, pre = _byte_tokens(folder, size, name)
        return Vocabulary("gpt2", pre, tokens=tokens, kinds=kinds, rules=rules)
    plain = architecture.plain_added
    made = _pieces(folder, size, plain=plain) if spelling == "sentencepiece" else _llama_tokens(folder, size)
    texts, scores, kinds = (list(column) for column in zip(*made, strict=True))
    return Vocabulary("llama", "default", tokens=texts, kinds=kinds, scores=scores, rules=rules)


def settings_in(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none. Raises `FormatError` for a file that cannot be read."""
    return read_json(path) if path.is_file() else {}


def _has(folder: Path, spelling: VocabularyKind) -> bool:
    """Whether a folder has a vocabulary of this spelling."""
    if spelling == "sentencepiece":
        return (folder / "tokenizer.model").is_file()
    tokenizer = settings_in(folder / "tokenizer.json")
    if spelling == "bytes":
        return bool(tokenizer) or (folder / "vocab.json").is_file()
    model = tokenizer.get("model", {})
    whole = model.get("ignore_merges", False) and not model.get("byte_fallback", True)
    fallback = model.get("byte_fallback", False) and tokenizer["decoder"]["type"] == "Sequence"
    return model.get("type") == "BPE" and bool(fallback) and not whole


def _rules(folder: Path, architecture: Architecture, spelling: VocabularyKind, size: int) -> TokenRules:
    """What the file says of special tokens and spaces whatever the tokenizer's files say."""
    pieces = architecture.rules if spelling == "sentencepiece" else TokenRules()
    sized = architecture.by_vocabulary.get(size, TokenRules())
    own = (
        settings_in(folder / "tokenizer_config.json").get("add_prefix_space")
        if architecture.own_space
        else None
    )
    return TokenRules(
        {**pieces.ids, **sized.ids},
        {**pieces.added, **sized.added},
        pieces.space if own is None else bool(own),
    )


def _looks_special(token: str) -> bool:
    """Whether a token that is not marked as one is a control token by its look."""
    return token in LOOK_SPECIAL or any(
        token.startswith(start) and token.endswith(end) for start, end in FENCES
    )


# --- merges of bytes --------------------------------------------------------------------------------------------------


def _byte_tokens(folder: Path, size: int, name: str) -> tuple[list[str], list[int], str]:
    """Tokens, their kinds, and how text is cut."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    if known and max(known) >= size:
        raise FormatError(
            f"the tokenizer of {name} has the id {max(known)}, and its model {size} tokens; use the one it was released with"
        )
    added, details = tokenizer.get_added_vocab(), tokenizer.added_tokens_decoder
    tokens: list[str] = []
    kinds: list[int] = []
    for number in range(size):
        token = known.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            kinds.append(UNUSED)
        elif token not in added:
            tokens.append(token)
            kinds.append(NORMAL)
        else:
            if not details[number].normalized:
                token = str(tokenizer.decode(tokenizer.encode(token, add_special_tokens=False)))
            special = details[number].special or _looks_special(token)
            tokens.append(token if special else token.replace(SPACE, " "))
            kinds.append(CONTROL if special else USER_DEFINED)
    return tokens, kinds, pretokenizer(tokenizer, name)


# --- pieces of sentencepiece ------------------------------------------------------------------------------------------

TokenPiece = tuple[bytes, float, int]
"""Text, score and kind of a token."""


def _pieces(folder: Path, size: int, *, plain: bool) -> list[TokenPiece]:
    """The pieces of a `tokenizer.model`, and the tokens that were added to them.

    `plain`: an added token is special only where it is marked as such, and those of tokenizer.json count too.
    """
    found: list[TokenPiece] = [(f"[PAD{number}]".encode(), ABSENT, UNUSED) for number in range(size)]
    for number, piece in enumerate(read_pieces(folder / "tokenizer.model")[:size]):
        found[number] = (piece.text, piece.score, NORMAL if piece.kind == USER_DEFINED else piece.kind)
    for text, number in settings_in(folder / "added_tokens.json").items():
        if number < size:
            found[number] = (text.encode(), ADDED, USER_DEFINED)
    added = dict(settings_in(folder / "tokenizer_config.json").get("added_tokens_decoder", {}))
    if plain:
        added |= {
            str(token["id"]): token
            for token in settings_in(folder / "tokenizer.json").get("added_tokens", [])
        }
    for number, token in added.items():
        if int(number) < size:
            special = bool(token.get("special")) or (not plain and _looks_special(token["content"]))
            text = token["content"] if special or plain else token["content"].replace(SPACE, " ")
            found[int(number)] = (text.encode(), ADDED, CONTROL if special else USER_DEFINED)
    return found


def _llama_tokens(folder: Path, size: int) -> list[TokenPiece]:
    """The pieces in a tokenizer.json, as the package `gguf` reads them, and ids without a token."""
    found = [(text, score, int(kind)) for text, score, kind in package().LlamaHfVocab(folder).all_tokens()]
    return found + [(f"[PAD{number}]".encode(), ABSENT, UNUSED) for number in range(len(found), size)]
