"""Token streams: files, sets and self-generated text, each with the hash of what was read."""

from fracbit.data.read import read_documents, read_sources
from fracbit.data.source import Source, parse_source
from fracbit.data.tokens import Calibration, Tokens, hash_ids, sample, shared_documents

__all__ = [
    "Calibration",
    "Source",
    "Tokens",
    "hash_ids",
    "parse_source",
    "read_documents",
    "read_sources",
    "sample",
    "shared_documents",
]
